__version__ = "0.0.1"

# `import decomp_nb` must cost milliseconds, so a name brings in its module (and torch) only when it is first used (PEP 562).
_homes = {
    "core": "Factors Decomposer recombine interpolate load_decomposer shipped",
    "methods.lsd": "LSD StableLSD",
    "methods.decomp_diffusion": "DecompDiffusion",
    "methods.disdiff": "DisDiff",
    "components.latent_diffusion": "LatentDiffusion",
    "methods.slot_diffusion": "SlotDiffusion",
    "methods.slate": "SLATE",
    "methods.slot_attention_ae": "SlotAttentionAE",
    "methods.concepts": "Concepts load_official_concepts",
    "training.trainer": "Trainer Run",
    "training.config": "TrainConfig",
    "data.catalog": "open_dataset",
    "data.scenes": "Scenes",
    "viz.pictures": "show grid overlay strip",
    "viz.mixer": "mixer",
    "convert": "load_official_lsd save_official_lsd load_official_decomp_diffusion save_official_decomp_diffusion "
               "load_official_disdiff load_official_latent_diffusion load_official_autoencoder",
}
_home_of = {name: home for home, names in _homes.items() for name in names.split()}
__all__ = sorted(_home_of)


def __getattr__(name):
    if name not in _home_of:
        raise AttributeError(f"module 'decomp_nb' has no attribute {name!r}")
    from importlib import import_module
    value = globals()[name] = getattr(import_module(f"decomp_nb.{_home_of[name]}"), name)
    return value


def __dir__():
    return sorted({*globals(), *__all__})
