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
    "viz.figures": "show grid overlay strip",
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


# Modules that have moved: the old name works for one version more, and warns.
_moved = {"viz.pictures": "viz.sheets viz.figures viz.plots"}


class _Moved:
    "Finds and fills the modules of `_moved`, where Python itself finds none"

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.removeprefix("decomp_nb.") in _moved:
            from importlib.machinery import ModuleSpec
            return ModuleSpec(name, _Moved)

    @staticmethod
    def create_module(spec):
        return None

    @staticmethod
    def exec_module(module):
        import warnings
        from importlib import import_module
        homes = [f"decomp_nb.{home}" for home in _moved[module.__name__.removeprefix("decomp_nb.")].split()]
        warnings.warn(f"{module.__name__} has moved to {' and '.join(homes[-2:])}", DeprecationWarning, stacklevel=2)
        for home in map(import_module, homes):
            vars(module).update({name: getattr(home, name) for name in home.__all__})


__import__("sys").meta_path.append(_Moved)
