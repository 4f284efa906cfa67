"The three stages of DisDiff, headless and in miniature: autoencoder → latent diffusion → factors → scores, and what does not fit together."
import json

import pytest
import torch
from test_runs import QUICK, execute

from decomp_nb.components.latent_diffusion import LatentDiffusion
from decomp_nb.components.latents import VQLatents, build_latents
from decomp_nb.methods.disdiff import DisDiff
from decomp_nb.training.run_directory import Run

ROOMS = dict(data="shapes3d", data_options={"sizes": [3, 3, 3, 2, 2, 2]}, n_images=24)
SMALL = dict(channels=[8, 16], layers_per_block=1, attention_levels=[1], n_heads=2, groups=4)


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stages")
    execute("train_autoencoder", folder, kind="vqvae", out_dir=str(folder / "ae"), image_size=16, factor=2, width=8, multipliers=[1, 1], n_codes=16, free_steps=0, latent_channels=3,
            adversarial=0.75, adversarial_width=8, adversarial_layers=1, eval_images=4, **ROOMS, **QUICK)
    execute("train_latent_diffusion", folder, out_dir=str(folder / "ldm"), latents_path=str(folder / "ae"), image_size=16, eval_images=10, samples=2, sample_steps=2, **SMALL, **ROOMS, **QUICK)
    execute("train_disdiff", folder, out_dir=str(folder / "dis"), base_path=str(folder / "ldm"), latents_path=str(folder / "ae"), preset="tiny", eval_images=48, sample_steps=2, **ROOMS, **QUICK)
    return folder


def test_each_stage_leaves_what_the_next_one_needs(stages):
    ae, ldm, dis = (Run(stages / name) for name in ("ae", "ldm", "dis"))
    assert isinstance(build_latents(str(ae.path)), VQLatents) and {"lr/autoencoder", "lr/discriminator"} <= set(ae.metrics("train")[-1])
    assert isinstance(ldm.model(), LatentDiffusion) and "noise_error" in json.loads((ldm.path / "scores.json").read_text())
    assert set(json.loads((dis.path / "scores.json").read_text())) == {"DisDiff", "untrained", "PCA", "PCA of the latents"}
    assert dis.curve("eval/factor_vae")[0] == [2, 4] and {"variant_hits", "invariant_hits", "denoising"} <= set(dis.metrics("train")[-1])
    assert {p.name for p in (dis.path / "pictures").glob("*.png")} >= {"swaps.png", "traversals.png"}


def test_the_run_is_a_method_that_loads_by_itself(stages, tmp_path):
    model = Run(stages / "dis").model().eval()
    (stages / "dis" / "whole").rename(tmp_path / "elsewhere")
    again = DisDiff.from_pretrained(tmp_path / "elsewhere").eval()
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    noise = torch.randn(2, *model.latent_shape)
    torch.testing.assert_close(again.reconstruct(x, steps=2, noise=noise), model.reconstruct(x, steps=2, noise=noise))
    untrained = DisDiff.from_config(dict(again.config)).eval()  # as eval_disentanglement makes it: encodes without its base
    assert untrained.encode(x).codes.shape == (2, 3, 4) and again.config.base_path == "base" and model.encode(x).codes.shape == (2, 3, 4)


def test_factors_are_found_with_tokens_and_fields_take_them_over(stages, tmp_path):
    "The two lines of the CPU recipe: circular codes that begin at circles, some of which read edges; then fields with that encoder"
    shape = dict(n_factors=3, factor_dim=2, model_options=dict(n_structure=1, circular=True, encoder_config=dict(width=8, linear_skip=4)))
    rooms = ROOMS | {"n_images": 60}
    reader = dict(sample_size=8, in_channels=3, out_channels=3, block_out_channels=[8, 16], layers_per_block=1, norm_num_groups=4, attention_head_dim=2)
    options = shape["model_options"] | dict(token_dim=8, denoiser_config=reader)
    execute("train_disdiff", tmp_path, out_dir=str(tmp_path / "tokens"), latents_path=str(stages / "ae"), preset="shapes3d_tokens", image_size=16, eval_images=48, sample_steps=2,
            **shape | {"model_options": options}, **rooms, **QUICK)
    execute("train_disdiff", tmp_path, out_dir=str(tmp_path / "fields"), base_path=str(stages / "ldm"), encoder_path=str(tmp_path / "tokens"), preset="tiny", eval_images=48, sample_steps=2,
            **shape, **rooms, **QUICK)
    on = shape | {"model_options": shape["model_options"] | {"trajectory_steps": 2}}
    execute("train_disdiff", tmp_path, out_dir=str(tmp_path / "on"), base_path=str(stages / "ldm"), encoder_path=str(tmp_path / "tokens"), fields_path=str(tmp_path / "fields"), preset="tiny",
            eval_images=48, sample_steps=2, **on, **rooms, **QUICK)
    assert "last" in Run(tmp_path / "on").metrics("train")[-1]
    tokens, fields = Run(tmp_path / "tokens"), Run(tmp_path / "fields")
    assert {"where they begin", "PCA of the latents, 6"} <= set(json.loads((tokens.path / "scores.json").read_text())) and "diagnostics/kl" in tokens.metrics("train")[-1]
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    torch.testing.assert_close(fields.model().eval().encode(x).codes, tokens.model().eval().encode(x).codes)
