"Codebooks, decoders and solvers: what a notebook cell is too small for — speed of writing, saved models, bad input, the start of codes."
import time

import pytest
import torch
from torch import nn

from decomp_nb.components import codebooks, decoders, samplers
from decomp_nb.components.autoencoders import VQAutoencoder, vq_model
from decomp_nb.components.diffusion import make_scheduler
from decomp_nb.components.dvae import DVAE
from decomp_nb.components.latents import VQLatents, build_latents
from decomp_nb.components.lpips import PerceptualDistance, vgg_distance
from decomp_nb.data.cache import cache_latents
from decomp_nb.decomposer import sample


def tiny_vq(**options):
    torch.manual_seed(0)
    return vq_model(4, **{**dict(width=8, multipliers=(1, 1, 2), layers_per_block=1, n_codes=32, groups=4, attention=False), **options})


@torch.no_grad()
def the_long_way(writer, slots):
    "Greedy writing that reads all words so far again at each step, as the official code does"
    words = torch.empty(len(slots), 0, dtype=torch.long)
    read, _ = writer._slots(slots, None)
    for i in range(writer.length):
        begin = torch.full((len(slots), 1), writer.vocabulary)
        x = writer.words(torch.cat([begin, words], 1)) + writer.places[:, :i + 1]
        for block, slot in zip(writer.blocks, read): x = block(x, slot)
        words = torch.cat([words, writer.head(writer.norm(x))[:, -1].argmax(-1, keepdim=True)], 1)
    return words


def test_writing_with_kept_keys_costs_a_fraction():
    "Counted in multiplications, which no busy machine can blur: every step reads one word instead of all words so far"
    from torch.utils.flop_counter import FlopCounterMode
    torch.manual_seed(3)
    writer = decoders.AutoregressiveDecoder(256, 256, 64, dim=32, n_layers=2, n_heads=4).eval()  # 16×16 words
    slots = torch.randn(1, 5, 64)
    work = []
    for write in (writer.generate, lambda s: the_long_way(writer, s)):
        with FlopCounterMode(display=False) as counter: words = write(slots)
        work.append((counter.get_total_flops(), words))
    likeliest = writer.generate(slots, return_logits=True)[1].topk(2, dim=-1).values
    clear = (likeliest[..., 0] - likeliest[..., 1]) > 1e-4  # all of them with this start
    sure = clear.cumprod(1).bool()  # before the first word that a rounding decides
    assert torch.equal(work[0][1][sure], work[1][1][sure]) and sure.float().mean() > 0.5
    assert work[1][0] > 50 * work[0][0], f"only {work[1][0] / work[0][0]:.0f} times less"


def test_free_steps_come_before_the_codebook():
    model = VQAutoencoder(tiny_vq(), free_steps=2).train()
    x = {"image": torch.rand(4, 3, 16, 16) * 2 - 1}
    book = model.vae.quantize.embedding.weight.detach().clone()
    assert model(x)["codebook"] == 0 and model(x)["codebook"] == 0 and torch.equal(model.vae.quantize.embedding.weight, book)
    assert model(x)["codebook"] > 0 and not torch.equal(model.vae.quantize.embedding.weight, book)  # now the codes are where the latents are
    assert model.eval().reconstruct(x["image"])[2].unique().numel() > 4


@pytest.mark.parametrize("legacy, beta", [(True, 0.25), (False, 0.25), (True, 1.0)])
def test_codebook_loss_equals_that_of_diffusers(legacy, beta):
    from diffusers.models.autoencoders.vae import VectorQuantizer
    torch.manual_seed(0)
    theirs, z = VectorQuantizer(16, 3, beta=beta, legacy=legacy), torch.randn(2, 3, 4, 4)
    theirs.embedding.weight.data.normal_()
    book = theirs.embedding.weight
    q, loss, (_, _, index) = theirs(z)
    ours, number = codebooks.quantise(z, book)
    torch.testing.assert_close(ours, q)
    assert torch.equal(number.flatten(), index)
    torch.testing.assert_close(codebooks.codebook_loss(z, book, number, beta=beta, legacy=legacy), loss)


def test_a_run_directory_is_a_space(tmp_path):
    trained = VQAutoencoder(tiny_vq()).train()
    trained({"image": torch.rand(2, 3, 16, 16)})
    trained.save_pretrained(tmp_path / "model")
    space = build_latents(str(tmp_path))
    assert isinstance(space, VQLatents) and space.shape(16) == (3, 4, 4) and not any(p.requires_grad for p in space.parameters()) and not space.train().training
    assert space.vae.config.scaling_factor != 1.0
    with pytest.raises(ValueError, match="multiple of 4"): space.encode(torch.zeros(1, 3, 18, 18))
    with pytest.raises(FileNotFoundError, match="no autoencoder"): build_latents("./nothing")
    DVAE(8, width=8).save_pretrained(tmp_path / "dvae")
    with pytest.raises(ValueError, match="DVAE"): build_latents(str(tmp_path / "dvae"))


def test_latents_can_be_cached(tmp_path):
    space = VQLatents(tiny_vq().eval())
    class Pictures:
        size = 16
        def __len__(self): return 5
        def __getitem__(self, i): return {"image": torch.full((3, 16, 16), i / 5)}
    cached = cache_latents(Pictures(), space, tmp_path)
    batch = torch.utils.data.default_collate([cached[i] for i in range(5)])
    torch.testing.assert_close(space.from_batch(batch), space.encode(batch["image"]), rtol=1e-4, atol=1e-5)


def test_perceptual_distance_trains_pictures_and_nothing_else():
    layer = nn.Conv2d(3, 4, 3)
    distance = PerceptualDistance(nn.Sequential(layer), None)
    distance.extractor.forward = lambda x: [layer(x)]
    model = VQAutoencoder(tiny_vq(), perceptual=distance).train()
    out = model({"image": torch.rand(2, 3, 16, 16)})
    out["loss"].backward()
    assert out["perceptual"] > 0 and layer.weight.grad is None and model.vae.encoder.conv_in.weight.grad.abs().sum() > 0
    assert not any("perceptual" in k for k in model.state_dict())
    with pytest.raises(ValueError, match="features"): vgg_distance({})


def test_dvae_cools_and_remembers(tmp_path):
    torch.manual_seed(0)
    model, x = DVAE(16, width=8, cooling_steps=4).train(), {"image": torch.rand(2, 3, 8, 8)}
    taus = [float(model(x)["tau"]) for _ in range(6)]
    assert taus[0] == 1 and taus == sorted(taus, reverse=True) and taus[-1] == pytest.approx(0.1)
    model.eval()(x)
    assert int(model.steps) == 6  # evaluation does not count
    model.save_pretrained(tmp_path)
    again = DVAE.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    assert again.tau == model.tau and torch.equal(again.tokens(x["image"]), model.tokens(x["image"]))
    with pytest.raises(ValueError, match="patches of 4"): model.tokens(torch.zeros(1, 3, 10, 10))


@pytest.mark.parametrize("make, complaint", [
    (lambda: vq_model(3), "power of two"), (lambda: vq_model(4, multipliers=(1, 2)), "3 levels"), (lambda: vq_model(4, width=12, groups=8), "groups=8"),
    (lambda: decoders.BroadcastDecoder(8, 48), "image_size=48"), (lambda: decoders.BroadcastDecoder(8, 128, channels=(8, 8)), "at most 2 times"),
    (lambda: decoders.AutoregressiveDecoder(8, 16, 4, dim=10, n_heads=4), "n_heads=4"), (lambda: decoders.AutoregressiveDecoder(8, 16, 4, dim=8, n_heads=2)(torch.zeros(1, 9, dtype=torch.long), torch.zeros(1, 2, 4)), "built for 16"),
    (lambda: samplers.step_orders(0), "at least one"), (lambda: samplers.step_orders(5, 4), "order=4"), (lambda: samplers.DDIM(make_scheduler()).set_timesteps(0), "steps=0"),
])
def test_bad_settings_name_themselves(make, complaint):
    with pytest.raises(ValueError, match=complaint): make()


def test_a_solver_can_be_used_again_and_does_not_copy_the_autoencoder():
    space, calls = VQLatents(tiny_vq().eval()), []
    solver = samplers.SinglestepSolver(make_scheduler(), project=lambda x: (calls.append(1), space.quantise(x))[1])
    x = torch.randn(1, 3, 4, 4)
    first, second = (sample(lambda x, t: 0.1 * x, x, solver, 7) for _ in range(2))
    assert torch.equal(first, second) and len(calls) == 14


def test_writing_takes_seconds_not_minutes():
    torch.manual_seed(0)
    writer = decoders.AutoregressiveDecoder(64, 64, 16, dim=32, n_layers=2, n_heads=4).eval()
    start = time.process_time()
    assert writer.generate(torch.randn(2, 4, 16)).shape == (2, 64) and time.process_time() - start < 5
