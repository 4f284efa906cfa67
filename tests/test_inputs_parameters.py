"What people write behind -p and into recipes: it works, or it is refused before a kernel starts, with the remedy."
import math

import pytest
from test_runs import ROOT

from decomp_nb.training.config import TrainConfig
from decomp_nb.training.launch import main, take_parameters
from decomp_nb.training.parameters import gather_values, parameters, read_literal

LSD = parameters(ROOT / "nbs" / "train_lsd.ipynb")
NOTEBOOKS = sorted(path.name for path in (ROOT / "nbs").glob("*.ipynb") if path.name.startswith(("train_", "eval_", "compare_")))


@pytest.mark.parametrize("text, expected", [
    ("{'a': true, 'b': null}", {"a": True, "b": None}), ('{"a": true, "b": [null, False]}', {"a": True, "b": [None, False]}), ("{a: false}", {"a": False}), ("{'a': {'b': true}}", {"a": {"b": True}}),
])
def test_dictionaries_of_json_and_python_and_both(text, expected):
    assert gather_values(LSD, [], [("model_options", text)]) == {"model_options": expected} and read_literal(text) == expected


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', "{a: 1, a: 2}", "{'a': ", "true", "[1]", "", "{a: !!python/name:os.system }"])
def test_what_is_no_dictionary_is_refused(text):
    with pytest.raises(ValueError, match="'model_options' expects dict"): gather_values(LSD, [], [("model_options", text)])


@pytest.mark.parametrize("name, text", [
    ("learning_rate", "inf"), ("learning_rate", "1e400"), ("max_minutes", "nan"), ("model_options", '{"min_snr_gamma": Infinity}'), ("model_options", "{'a': [1.0, {'b': 1e999}]}"), ("data_options", "{a: .nan}"),
])
def test_numbers_that_are_not_finite_are_refused_at_any_depth(name, text):
    with pytest.raises(ValueError, match=f"'{name}': (inf|nan) is not a finite number"): gather_values(LSD, [], [(name, text)])


@pytest.mark.parametrize("options", [{"learning_rate": math.inf}, {"max_grad_norm": math.inf}, {"weight_decay": -math.inf}, {"adam_epsilon": math.nan}, {"max_minutes": math.inf}])
def test_a_training_refuses_them_too(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}: .* is not a finite number"): TrainConfig(**options).validate()


@pytest.mark.parametrize("value", [False, "no"])
def test_no_precision_is_the_word_no(tmp_path, value):
    "Jupyter's papermill reads `mixed_precision: no` as False; our own recipes read it as it stands"
    assert TrainConfig(mixed_precision=value).validate().mixed_precision == "no"
    (tmp_path / "recipe.yaml").write_text("mixed_precision: no\nseed: 010\nlearning_rate: 1e-3\n")
    assert gather_values(LSD, [tmp_path / "recipe.yaml"], []) == {"mixed_precision": "no", "seed": 10, "learning_rate": 1e-3}
    (tmp_path / "recipe.yaml").write_text("mixed_precision: true\n")
    with pytest.raises(ValueError, match="'mixed_precision' expects str, got True"): gather_values(LSD, [tmp_path / "recipe.yaml"], [])


@pytest.mark.parametrize("name, text, said", [("weight_decay", "-1e-4", "weight_decay: -0.0001 is below 0"), ("seed", "-3", "seed: -3 is below 0"), ("out_dir", "a\0b", "out_dir: holds a zero character")])
def test_a_value_that_looks_like_an_option_is_a_value(name, text, said):
    pairs, rest = take_parameters(["run", "nb.ipynb", "-p", name, text, "--check"])
    assert pairs == [(name, text)] and rest == ["run", "nb.ipynb", "--check"]
    with pytest.raises(ValueError, match=said): gather_values(LSD, [], pairs)


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_an_empty_text_is_refused_where_it_means_nothing(notebook, capsys):
    accepted = parameters(ROOT / "nbs" / notebook)
    refused = [p.name for p in accepted.values() if p.type == "str" and p.default and "empty" not in p.help]
    for name in refused:
        with pytest.raises(ValueError, match=f"{name}'? ?:? is empty"): gather_values(accepted, [], [(name, "")])
    for p in accepted.values():
        if p.type == "str" and p.name not in refused: assert gather_values(accepted, [], [(p.name, "")]) == {p.name: ""}
    assert refused and main(["run", str(ROOT / "nbs" / notebook), "-p", refused[0], ""]) == 2
    assert "is empty" in capsys.readouterr().err


# -- counts that are none ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("notebook, name, text, least", [
    ("train_lsd", "eval_seeds", "0", 1), ("train_lsd", "n_images", "-1", 0), ("train_lsd", "eval_scenes", "0", 1), ("train_lsd", "sample_steps", "-5", 1), ("train_lsd", "n_slots", "-7", 0), ("eval_generation", "n_images", "0", 1), ("eval_segmentation", "seeds", "0", 1),
    ("train_concepts", "n_per_class", "-2", -1), ("eval_concepts", "n_per_class", "-1", 1), ("eval_video", "n_clips", "0", 1), ("train_text_to_image", "n_images", "0", 1), ("train_readout", "n_hidden", "-1", 0),
])
def test_counts_that_count_nothing_are_refused_before_a_kernel_starts(notebook, name, text, least, capsys):
    path = ROOT / "nbs" / f"{notebook}.ipynb"
    with pytest.raises(ValueError, match=f"parameter '{name}': {text} is below {least}"): gather_values(parameters(path), [], [(name, text)])
    assert gather_values(parameters(path), [], [(name, str(least))]) == {name: least}
    assert main(["run", str(path), "-p", name, text, "--check"]) == 2 and f"{text} is below {least}" in capsys.readouterr().err


@pytest.mark.parametrize("notebook", [name for name in NOTEBOOKS if "batch_size" in parameters(ROOT / "nbs" / name)])
def test_a_batch_of_nothing_is_refused_everywhere(notebook):
    with pytest.raises(ValueError, match="batch_size: 0 is below 1"): gather_values(parameters(ROOT / "nbs" / notebook), [], [("batch_size", "0")])


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_defaults_are_counts_that_are_allowed(notebook):
    accepted = parameters(ROOT / "nbs" / notebook)
    gather_values(accepted, [], [(p.name, p.default) for p in accepted.values() if type(p.default) in (int, float, list)])


@pytest.mark.parametrize("notebook, name", [("compare_slots", "seeds"), ("compare_slots", "methods"), ("eval_probing", "kinds"), ("train_latent_diffusion", "channels")])
def test_lists_of_nothing_are_refused(notebook, name):
    with pytest.raises(ValueError, match=f"parameter '{name}' is empty"): gather_values(parameters(ROOT / "nbs" / f"{notebook}.ipynb"), [], [(name, "[]")])
