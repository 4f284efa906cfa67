"""The original STEVE's files: a file made in the official layout, and what the official formulas, written down anew, make of it."""
import pytest
import torch
import torch.nn.functional as F

from decomp_nb.components.positions import coordinate_grid
from decomp_nb.official.slots import load_official_slots
from decomp_nb.official.steve import load_original_steve

SIDE, D, SLOT, V, BLOCKS, K = 4, 24, 16, 16, 2, 5  # places of tokens, widths, vocabulary, blocks, slots
E, S, T = "steve_encoder", "steve_encoder.savi", "steve_decoder"


def both(name, *shape): return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
def mlp(name, d, hidden): return both(f"{name}.0", hidden, d) | both(f"{name}.2", d, hidden)


def block(name, d, attentions):
    shapes = mlp(f"{name}.ffn", d, 4 * d) | both(f"{name}.ffn_layer_norm", d)
    for part in attentions: shapes |= both(f"{name}.{part}_layer_norm", d) | {f"{name}.{part}.proj_{p}.weight": (d, d) for p in "qkvo"}
    return shapes


def convolution(name, normed, *shape):
    return {f"{name}.m.weight": shape} | (both(name, shape[0]) | {f"{name}.weight": shape[:1]} if normed else {f"{name}.m.bias": shape[:1]})


def dvae_shapes(normed, w=8):
    "Blocks of the discrete VAE: encoder 0 to 6, decoder 0, then twice four blocks and a shuffle"
    shapes = convolution("dvae.encoder.0", normed, w, 3, 4, 4) | both("dvae.encoder.7", V, w, 1, 1) | convolution("dvae.decoder.0", normed, w, V, 1, 1) | both("dvae.decoder.11", 3, w, 1, 1)
    for i in range(1, 7): shapes |= convolution(f"dvae.encoder.{i}", normed, w, w, 1, 1)
    for first in (1, 6):
        shapes |= convolution(f"dvae.decoder.{first}", normed, w, w, 3, 3) | convolution(f"dvae.decoder.{first + 3}", normed, 4 * w, w, 1, 1)
        for i in (1, 2): shapes |= convolution(f"dvae.decoder.{first + i}", normed, w, w, 1, 1)
    return shapes


def shapes(normed):
    n = SIDE ** 2
    found = dvae_shapes(normed) | both(f"{E}.cnn.3", D, 8, 5, 5) | both(f"{E}.pos.projection", D, 4, 1, 1) | both(f"{E}.layer_norm", D) | mlp(f"{E}.mlp", D, D)
    for i, before in enumerate((3, 8, 8)): found |= both(f"{E}.cnn.{i}.m", 8, before, 5, 5)
    found |= {f"{E}.slot_proj.weight": (D, SLOT), f"{S}.slot_mu": (1, 1, SLOT), f"{S}.slot_log_sigma": (1, 1, SLOT)} | mlp(f"{S}.mlp", SLOT, 2 * SLOT)
    for name, d in (("inputs", D), ("slots", SLOT), ("mlp", SLOT)): found |= both(f"{S}.norm_{name}", d)
    for name, d in (("q", SLOT), ("k", D), ("v", D)): found |= {f"{S}.project_{name}.weight": (SLOT, d)}
    for way in ("ih", "hh"): found |= {f"{S}.gru.weight_{way}": (3 * SLOT, SLOT), f"{S}.gru.bias_{way}": (3 * SLOT,)}
    for i in range(2): found |= block(f"{S}.predictor.blocks.{i}", SLOT, ["attn"])
    for i in range(BLOCKS): found |= block(f"{T}.tf.blocks.{i}", D, ["self_attn", "encoder_decoder_attn"])
    found |= both(f"{S}.predictor.layer_norm", SLOT) | both(f"{T}.tf.layer_norm", D)
    return found | {f"{T}.head.weight": (V, D), f"{T}.dict.dictionary.weight": (V, D), f"{T}.bos": (1, 1, D), f"{T}.pos.pe": (1, n + 1, D)}


def official_state(normed=False):
    "Random weights, neither tiny nor wild, with the tables that the official code stores"
    g = torch.Generator().manual_seed(0)
    state = {}
    for key, shape in shapes(normed).items():
        drawn, several = torch.randn(shape, generator=g), len(shape) > 1
        state[key] = drawn * (2 / torch.Size(shape[1:]).numel()) ** 0.5 if several else 0.1 * drawn
        if not several and key.endswith("weight"): state[key] += 1  # of norms
    state[f"{E}.pos.pe"] = coordinate_grid(2 * SIDE)[..., [1, 0, 3, 2]].permute(2, 0, 1)[None]
    state |= {f"{T}.tf.blocks.{i}.self_attn_mask": torch.ones(SIDE ** 2, SIDE ** 2, dtype=torch.bool).triu(1) for i in range(BLOCKS)}
    return state


class Read(dict):
    "A state dict that knows what was read of it"
    def __init__(self, state):
        super().__init__(state)
        self.used = set()

    def __getitem__(self, key):
        self.used.add(key)
        return super().__getitem__(key)

    def get(self, key, default=None): return self[key] if key in self else default


# --- the official formulas, by hand ---------------------------------------------------------------------------------


def linear(s, name, x): return x @ s[f"{name}.weight"].T + s.get(f"{name}.bias", 0)


def norm(s, name, x):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * s[f"{name}.weight"] + s[f"{name}.bias"]


def attention(s, name, q, kv, hidden=None, heads=4):
    split = lambda x: x.unflatten(-1, (heads, -1)).transpose(-3, -2)
    q, k, v = split(linear(s, f"{name}.proj_q", q)), split(linear(s, f"{name}.proj_k", kv)), split(linear(s, f"{name}.proj_v", kv))
    logits = q @ k.mT / q.shape[-1] ** 0.5
    if hidden is not None: logits = logits.masked_fill(hidden, -torch.inf)
    return linear(s, f"{name}.proj_o", (logits.softmax(-1) @ v).transpose(-3, -2).flatten(-2))


def feed_forward(s, name, x): return x + linear(s, f"{name}.ffn.2", linear(s, f"{name}.ffn.0", norm(s, f"{name}.ffn_layer_norm", x)).relu())


def predict(s, slots):
    for i in range(2):
        name = f"{S}.predictor.blocks.{i}"
        normed = norm(s, f"{name}.attn_layer_norm", slots)
        slots = feed_forward(s, name, (normed if i == 0 else slots) + attention(s, f"{name}.attn", normed, normed))
    return norm(s, f"{S}.predictor.layer_norm", slots)


def features(s, frames):
    "Frames in [0, 1] → (n, places, d)"
    x = frames
    for i in range(3): x = F.conv2d(x, s[f"{E}.cnn.{i}.m.weight"], s[f"{E}.cnn.{i}.m.bias"], stride=2 if i == 0 else 1, padding=2).relu()
    x = F.conv2d(x, s[f"{E}.cnn.3.weight"], s[f"{E}.cnn.3.bias"], padding=2)
    x = x + F.conv2d(s[f"{E}.pos.pe"], s[f"{E}.pos.projection.weight"], s[f"{E}.pos.projection.bias"])
    return linear(s, f"{E}.mlp.2", linear(s, f"{E}.mlp.0", norm(s, f"{E}.layer_norm", x.flatten(2).mT)).relu())


def gru(s, x, h):
    to, back = x @ s[f"{S}.gru.weight_ih"].T + s[f"{S}.gru.bias_ih"], h @ s[f"{S}.gru.weight_hh"].T + s[f"{S}.gru.bias_hh"]
    (r, z, n), (hr, hz, hn) = to.chunk(3, -1), back.chunk(3, -1)
    r, z = (r + hr).sigmoid(), (z + hz).sigmoid()
    return (1 - z) * (n + r * hn).tanh() + z * h


def follow(s, video, noise, iterations=2):
    "Slots (b,t,k,d) and attention (b,t,n,k)"
    places = norm(s, f"{S}.norm_inputs", features(s, video.flatten(0, 1))).unflatten(0, video.shape[:2])
    slots, found, seen = s[f"{S}.slot_mu"] + s[f"{S}.slot_log_sigma"].exp() * noise, [], []
    for frame in places.unbind(1):
        k, v = linear(s, f"{S}.project_k", frame) / SLOT ** 0.5, linear(s, f"{S}.project_v", frame)
        for i in range(iterations):
            won = (k @ linear(s, f"{S}.project_q", norm(s, f"{S}.norm_slots", slots)).mT).softmax(-1)
            share = (won + 1e-8) / (won + 1e-8).sum(-2, keepdim=True)
            slots = gru(s, share.mT @ v, slots)
            if i < iterations - 1: slots = slots + linear(s, f"{S}.mlp.2", linear(s, f"{S}.mlp.0", norm(s, f"{S}.norm_mlp", slots)).relu())
        found.append(slots), seen.append(won)
        slots = predict(s, slots)
    return torch.stack(found, 1), torch.stack(seen, 1)


def dvae_part(s, part, x, shuffles, last):
    for i in range(last):
        if i in shuffles: x = F.pixel_shuffle(x, 2)
        else:
            name, weight = f"dvae.{part}.{i}", s[f"dvae.{part}.{i}.m.weight"]
            stride, padding = (4, 0) if (part, i) == ("encoder", 0) else (1, weight.shape[-1] // 2)
            x = F.conv2d(x, weight, s.get(f"{name}.m.bias"), stride=stride, padding=padding)
            x = (F.group_norm(x, 1, s[f"{name}.weight"], s[f"{name}.bias"]) if f"{name}.weight" in s else x).relu()
    return F.conv2d(x, s[f"dvae.{part}.{last}.weight"], s[f"dvae.{part}.{last}.bias"])


def picture_of(s, tokens): return dvae_part(s, "decoder", F.one_hot(tokens, V).movedim(-1, 1).float(), (5, 10), 11).clamp(0, 1)


def logits_of(s, tokens, slots):
    "Tokens (n, m), m ≤ N: logits (n, m, V) of tokens 1 … m, each from those before it"
    x = torch.cat([s[f"{T}.bos"].expand(len(tokens), 1, -1), s[f"{T}.dict.dictionary.weight"][tokens[:, :-1]]], 1) + s[f"{T}.pos.pe"][:, :tokens.shape[1]]
    read, hidden = linear(s, f"{E}.slot_proj", slots), torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    for i in range(BLOCKS):
        name = f"{T}.tf.blocks.{i}"
        normed = norm(s, f"{name}.self_attn_layer_norm", x)
        x = (normed if i == 0 else x) + attention(s, f"{name}.self_attn", normed, normed, hidden)
        x = x + attention(s, f"{name}.encoder_decoder_attn", norm(s, f"{name}.encoder_decoder_attn_layer_norm", x), read)
        x = feed_forward(s, name, x)
    return linear(s, f"{T}.head", norm(s, f"{T}.tf.layer_norm", x))


# --- the tests ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normed", [False, True])
@torch.no_grad()
def test_a_file_in_the_official_layout_gives_the_official_numbers(normed, tmp_path):
    s = Read(official_state(normed))
    torch.save({"epoch": 2, "best_val_loss": 1.0, "best_epoch": 1, "model": dict(s), "optimizer": {"state": {}, "param_groups": []}}, tmp_path / "checkpoint.pt.tar")
    model = load_original_steve(tmp_path / "checkpoint.pt.tar", n_slots=K)
    g = torch.Generator().manual_seed(1)
    video, noise = torch.rand(2, 3, 3, SIDE, SIDE, generator=g).repeat_interleave(4, -1).repeat_interleave(4, -2), torch.randn(2, K, SLOT, generator=g)
    ours, (slots, won) = 2 * video - 1, follow(s, video, noise)
    factors = model.encode(ours, noise=noise)
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)
    close(factors.codes, slots)
    close(factors.masks.flatten(-2), won.mT)
    close(model.dvae.logits(ours.flatten(0, 1)), dvae_part(s, "encoder", video.flatten(0, 1), (), 7))
    tokens = torch.randint(V, (6, SIDE ** 2), generator=g)
    _, logits, _ = model.predict_tokens({"image": ours, "slot_noise": noise, "tokens": tokens.view(2, 3, SIDE, SIDE)})
    close(logits, logits_of(s, tokens, slots.flatten(0, 1)))
    close(model.dvae.decode(tokens.view(6, SIDE, SIDE)).clamp(-1, 1), 2 * picture_of(s, tokens.view(6, SIDE, SIDE)) - 1)
    written = model.generate(factors).flatten(0, 1)
    expected = torch.zeros(6, SIDE ** 2, dtype=torch.long)
    for i in range(SIDE ** 2): expected[:, i] = logits_of(s, expected[:, :i + 1], slots.flatten(0, 1))[:, i].argmax(-1)
    assert torch.equal(written.flatten(1), expected)
    close(model.decode(factors).flatten(0, 1), 2 * picture_of(s, written) - 1)
    assert {key for key in s if not key.endswith("self_attn_mask")} == s.used  # every tensor had its part in the comparison


def test_what_does_not_fit_is_named(tmp_path):
    s = official_state()
    wrong = {"lacks steve_decoder.bos": {k: v for k, v in s.items() if k != f"{T}.bos"}, "left over: steve_encoder.more": s | {f"{E}.more": torch.zeros(1)}, "missing: slot_attention.gru.bias_hh": {k: v for k, v in s.items() if k != f"{S}.gru.bias_hh"},
             "other positions": s | {f"{E}.pos.pe": s[f"{E}.pos.pe"].flip(1)}, "no file of the original STEVE": {"init_latents": torch.zeros(1)}}
    for match, state in wrong.items():
        torch.save(state, tmp_path / "bad.pt")
        with pytest.raises(ValueError, match=match): load_original_steve(tmp_path / "bad.pt")
    torch.save(s, tmp_path / "good.pt")
    with pytest.raises(ValueError, match="original STEVE: load_original_steve reads it"): load_official_slots(tmp_path / "good.pt")
