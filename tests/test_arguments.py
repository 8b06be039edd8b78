"""Options that cannot be meant are refused by name before anything else is done."""

import dataclasses

import pytest

from arguments import RunArguments, RunOptions
from files import UserError
from options import parse_options
from run_qa import choose_output_dir

NUMBERS = {
    field.name: kind
    for fields in (RunOptions, RunArguments)
    for field in dataclasses.fields(fields)
    for kind in (int, float)
    if field.init and str(kind.__name__) in str(field.type)
}


def parse(*argv):
    return parse_options((RunOptions, RunArguments), list(argv), "")


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_without_bounds_are_refused(name):
    values = ["1" + "0" * 30, "-1" + "0" * 30]
    for value in values + ["nan", "inf", "-inf", "1e300"] * (NUMBERS[name] is float):
        with pytest.raises(UserError, match=name):
            parse(f"--{name}={value}")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--report_to", "wandb"], "--report_to: cannot be used: WandbCallback requires wandb"),
        (["--report_to", "nothing"], "--report_to: cannot be used: nothing is not supported"),
        (["--lr_scheduler_kwargs", '{"x": 1}'], "--lr_scheduler_type with --lr_scheduler_kwargs: cannot be used"),
        (["--lr_scheduler_kwargs", '{"x"'], "--lr_scheduler_kwargs is not JSON"),
        (["--lr_scheduler_type", "cosine_with_min_lr"], "One of min_lr or min_lr_rate should be set"),
        (["--torch_compile_mode", "fastest"], "--torch_compile_mode: cannot be used: Unrecognized mode=fastest"),
        (["--torch_compile_backend", "x"], "--torch_compile_backend with --torch_compile_mode: cannot be used"),
        (["--optim", "rmsprop", "--optim_args", "alpha=x"], "--optim with --optim_args: cannot be used"),
        (["--optim", "lomo"], "--optim with --optim_args: cannot be used: You need to install"),
        (["--accelerator_config", '{"x": 1}'], "unexpected keyword argument 'x'"),
        (["--n_best_size", "10001"], "--n_best_size is 10001, must be at most 10000"),
        (["--adam_beta1", "1"], "--adam_beta1 is 1.0, must be at most"),
    ],
)
def test_what_the_trainer_cannot_be_made_of_is_refused_at_once(flags, message):
    with pytest.raises(UserError) as error:
        parse(*flags)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "flags",
    [
        ["--report_to", "none"],
        ["--optim", "adafactor"],
        ["--lr_scheduler_type", "cosine_with_min_lr", "--lr_scheduler_kwargs", '{"min_lr": 0}'],
        ["--lr_scheduler_type", "reduce_lr_on_plateau"],
        ["--seed", str(2**32 - 1)],
        ["--max_steps", "-1", "--save_total_limit", "0", "--num_train_epochs", "0"],
    ],
)
def test_what_it_can_be_made_of_is_not(flags):
    parse(*flags)


@pytest.mark.parametrize(
    ("flags", "folder"),
    [
        (["--model_name_or_path", "hfl/rbt3"], "outputs/rbt3"),
        (["--model_name_or_path", "hfl/rbt3", "--output_dir", "../x"], "../x"),
        (["--model_name_or_path", "/"], None),
        (["--model_name_or_path", "m", "--config", "..yaml"], None),
        (["--model_name_or_path", "m", "--config", "...yaml"], None),
        (["--model_name_or_path", "m", "--config", "c.yaml", "--member", ".."], None),
        (["--model_name_or_path", "m", "--config", "c.yaml", "--member", "a/../../b"], None),
        (["--model_name_or_path", "m", "--config", "c.yaml", "--member", "a"], "outputs/c/a"),
    ],
)
def test_a_name_does_not_lead_out_of_the_folder_of_runs(flags, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("..yaml", "...yaml"):
        (tmp_path / name).touch()
    (tmp_path / "c.yaml").write_text("members: {'..': {}, a: {}, 'a/../../b': {}}")
    options, arguments = parse(*flags)
    if folder is None:
        with pytest.raises(UserError, match="is no name for a folder in outputs/; choose one with --output_dir"):
            choose_output_dir(options, arguments)
    else:
        assert str(choose_output_dir(options, arguments)) == folder


@pytest.mark.parametrize(("flags", "expected"), [
    (["--mixed_precision", "no", "--bf16"], False),
    (["--mixed_precision", "bf16"], True),
    (["--mixed_precision", "auto"], False),
    (["--bf16"], True),
    ([], False),
])  # fmt: skip
def test_mixed_precision_on_a_cpu(flags, expected):
    (found,) = parse_options((RunOptions, RunArguments), flags, "")[1:]
    assert found.bf16 == expected and not found.fp16
