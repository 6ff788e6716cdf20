"""Settings: the merge, errors that name the place, and identities that depend on the settings that matter only."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from support import tiny

from sitkit.registry import backbones, registries
from sitkit.registry.settings_files import presets
from sitkit.runs.config.identity import label, sampling_identity, slug, training_identity
from sitkit.runs.config.mappings import flat, merge
from sitkit.runs.config.schema import Config, RunSettings, SampleSettings, Settings, TrainSettings
from sitkit.runs.config.sources import Layer, assemble, read_assignments, read_config, read_value, read_yaml, replaced
from sitkit.runs.run_folder import read_config_of, write_config
from sitkit.runtime.errors import UserError
from sitkit.runtime.files import file_name
from sitkit.runtime.hashing import hyphenated, identity
from sitkit.studies.search.space import Confirm, Screen, Search, SearchGoal
from sitkit.studies.study import Study

numbers = st.integers(-3, 3)


def fields(*names: str) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=dict.fromkeys(names, numbers))


def part(name: str) -> st.SearchStrategy[Any]:
    """A component by name, by name with fields, or fields alone."""
    named = fields("a", "b").map(lambda f: {"name": name, **f})
    return st.one_of(st.just(name), named, fields("a", "b"))


# Trees of one shape: a group, a component that keeps its name, a nested one, a list, a number.
trees = st.fixed_dictionaries(
    {},
    optional={
        "train": fields("steps", "batch"),
        "sampler": st.one_of(part("heun"), st.fixed_dictionaries({"grid": part("power")})),
        "metric": st.lists(numbers),
        "n": numbers,
    },
)


def components_spelt_out(tree: dict[str, Any]) -> dict[str, Any]:
    tree = dict(tree)
    sampler = tree.get("sampler")
    if isinstance(sampler, str):
        tree["sampler"] = {"name": sampler}
    elif isinstance(sampler, dict) and isinstance(sampler.get("grid"), str):
        tree["sampler"] = sampler | {"grid": {"name": sampler["grid"]}}
    return tree


@given(trees)
def test_merge_has_a_unit_and_is_idempotent(tree: dict[str, Any]) -> None:
    assert merge({}, tree) == tree
    assert merge(tree, {}) == tree
    assert merge(tree, tree) == tree


@given(trees, trees, trees)
def test_merge_is_associative_where_parts_keep_their_names(a: Any, b: Any, c: Any) -> None:
    left, right = merge(merge(a, b), c), merge(a, merge(b, c))
    assert components_spelt_out(left) == components_spelt_out(right)


@given(trees, trees)
def test_the_upper_value_wins_and_all_others_stay(under: dict[str, Any], over: dict[str, Any]) -> None:
    merged = flat(components_spelt_out(merge(under, over)))
    top = flat(components_spelt_out(over))
    assert {key: merged[key] for key in top if top[key] != {}} == {k: v for k, v in top.items() if v != {}}
    beneath = {k: v for k, v in flat(components_spelt_out(under)).items() if k not in top and "metric" not in k}
    assert beneath.items() <= merged.items()


@given(fields("a", "b"), fields("a", "c"))
def test_a_part_that_changes_its_name_keeps_no_field(old: dict[str, Any], new: dict[str, Any]) -> None:
    over = {"name": "euler", **new}
    assert merge({"sampler": {"name": "heun", **old}}, {"sampler": over}) == {"sampler": over}
    assert merge({"sampler": {"name": "heun", **old}}, {"sampler": "euler"}) == {"sampler": {"name": "euler"}}


@given(fields("a", "b"), fields("a", "c"))
def test_a_part_that_keeps_its_name_keeps_its_fields(old: dict[str, Any], new: dict[str, Any]) -> None:
    kept = {"name": "heun", **old, **new}
    assert merge({"name": "heun", **old}, {"name": "heun", **new}) == kept
    assert merge({"name": "heun", **old}, new) == kept


def test_a_change_of_the_preset_keeps_what_no_preset_sets() -> None:
    digits = read_config("digits")
    small = assemble([digits, Layer({"backbone": "sit-xs/4"})]).backbone
    assert small == backbones.create("sit-xs/4", time_scale=1000)
    base = {"backbone": {"name": "sit-xs/2", "hidden_size": 48, "learn_sigma": True, "class_dropout": 0.0}}
    assert merge(base, {"backbone": {"name": "sit-s/2", "qk_norm": True}}) == {
        "backbone": {"name": "sit-s/2", "class_dropout": 0.0, "qk_norm": True}
    }
    # A resolved configuration has every field: the size and learn_sigma are those of the new preset.
    resolved = assemble([digits]).plain()
    assert assemble([Layer(resolved), Layer({"backbone": "sit-s/2"})]).backbone == backbones.create(
        "sit-s/2", time_scale=1000
    )
    assert merge({"name": "kl", "norm": 2.0}, "sbdm") == {"name": "sbdm", "norm": 2.0}
    assert merge({"name": "sit-xs/2", "time_scale": 9}, "mlp") == {"name": "mlp"}


def test_settings_that_go_with_a_component_are_named() -> None:
    digits = read_config("digits")
    flags = Layer({"sampler": "euler-maruyama", "backbone": "sit-xs/4"}, {"sampler": "--sampler"})
    assert replaced([digits, flags]) == [
        "--sampler: sampler 'euler-maruyama' takes the place of 'heun' and of its steps = 25."
    ]
    assert replaced([Layer(assemble([digits]).plain()), flags]) == replaced([digits, flags])
    # sit-s/2 sets the width, but not learn_sigma.
    own = Layer({"backbone": {"name": "sit-xs/2", "hidden_size": 48}})
    (note,) = replaced(
        [Layer({"backbone": {**own.values["backbone"], "learn_sigma": False}}), Layer({"backbone": "sit-s/2"})]
    )
    assert note == "backbone 'sit-s/2' takes the place of 'sit-xs/2' and of its learn_sigma = False."
    assert replaced([own, Layer({"backbone": "sit-s/2"})]) == []
    wrong = Layer({"sampler": {"name": "heun", "stepz": 3}})
    assert replaced([wrong, Layer({"sampler": "euler"})]) == []
    assert replaced([digits, Layer({"interp": "gvp", "sampler": {"steps": 9}})]) == []


@given(trees, trees)
def test_merge_changes_neither(a: dict[str, Any], b: dict[str, Any]) -> None:
    before = repr((a, b))
    merge(a, b)
    assert repr((a, b)) == before


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("1.e-3", 1e-3), (".5", 0.5), ("1_000", 1000), ("0x1F", 31), ("012", 12), ("true", True),
        ("no", "no"), ("yes", "yes"), ("on", "on"), ("off", "off"), ("null", None), ("'no'", "no"), ("[1, 2e-1]", [1, 0.2]),
        ("{name: power, rho: 7}", {"name": "power", "rho": 7}), ("12:30:45", "12:30:45"), ("sit-b/2", "sit-b/2"), ("[1,", "[1,"),
    ],
)  # fmt: skip
def test_values_are_yaml_1_2(text: str, value: Any) -> None:
    read = read_value(text)
    assert read == value and type(read) is type(value)


def test_a_file_gives_plain_values_and_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("# settings\ntrain:\n  lr: 1e-4\n  clip: 1\nmetric:\n  - frechet\n  - {name: mmd}\n")
    layer = read_yaml(path)
    assert layer.values == {"train": {"lr": 1e-4, "clip": 1}, "metric": ["frechet", {"name": "mmd"}]}
    plain = [layer.values, layer.values["train"], layer.values["metric"], *layer.values["train"].values()]
    assert {type(value) for value in plain} == {dict, list, float, int}
    lines = {"train": 2, "train.lr": 3, "train.clip": 4, "metric": 5, "metric.0": 6, "metric.1": 7, "metric.1.name": 7}
    assert layer.where == {key: f"{path}:{line}" for key, line in lines.items()}


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert assemble([read_yaml(tmp_path / "empty.yaml")]) == assemble([])


# (content of the file, line of the mistake, words of the message)
MISTAKES = [
    # Names that are not registered.
    ("interp:\n  name: gpv\n", 2, ("'gvp'",)),
    ("interp: gpv\n", 1, ("No interpolant named 'gpv'", "Did you mean 'gvp'?")),
    ("train:\n  steps: 3\ntarget: veloctiy\n", 3, ("No target named 'veloctiy'", "'velocity'")),
    ("data: digits\nsampler: huen\n", 2, ("No sampler named 'huen'", "'heun'")),
    ("sampler:\n  name: heun\n  grid:\n    name: powr\n", 4, ("No timestep named 'powr'", "'power'")),
    ("backbone: sit-b/3\n", 1, ("No backbone named 'sit-b/3'", "'sit-b/")),
    ("metric:\n  - frechet\n  - frechett\n", 3, ("No metric named 'frechett'", "'frechet'")),
    # Keys that do not exist.
    ("data: digits\nsampler:\n  name: heun\n  stepz: 3\n", 4, ("sampler 'heun' has no field 'stepz'", "'steps'")),
    ("sampler:\n  name: heun\n  grid:\n    name: power\n    rh: 3\n", 5, ("no field 'rh'", "'rho'")),
    ("guidance:\n  name: cfg\n  scael: 2\n", 3, ("'scale'",)),
    ("train:\n  stepz: 4\n", 2, ("unknown key 'train.stepz'", "'steps'")),
    ("trian: {steps: 3}\n", 1, ("unknown key 'trian'", "'train'")),
    # Values that do not fit.
    ("sampler:\n  name: heun\n  steps: 0\n", 3, ("sampler 'heun'", "steps must be at least 1", "0")),
    ("data:\n  name: npz\n  path: x\n  holdout: 2\n", 4, ("dataset 'npz'", "holdout must be")),
    ("sampler:\n  name: heun\n  steps: many\n", 3, ("sampler 'heun'", "steps", "integer")),
    ("data: {name: npz}\n", 1, ("dataset 'npz'", "path", "required")),
    ("train:\n\n  steps: -4\n", 3, ("train.steps", "-4", "0")),
    ("train:\n  steps: ten\n", 2, ("train.steps", "integer", "'ten'")),
    ("train: {lr: .inf}\n", 1, ("train.lr", "finite")),
    ("train: fast\n", 1, ("train is a group of settings", "'fast'")),
    ("sample:\n  labels: balancd\n", 2, ("sample.labels", "'balanced'")),
    # YAML that is refused.
    ("interp: linear\ndata: !!python/object/apply:os.system ['true']\n", 2, ("tag", "os.system", "data")),
    ("train: {steps: 1}\ntrain: {steps: 2}\n", 2, ("duplicate key", "train")),
    ("sampler: {name: heun,\n  name: euler}\n", 2, ("duplicate key", "name")),
    ("interp: linear\ntrain: [1, 2\n", 3, ("expected",)),
    ("interp: *other\n", 1, ("alias", "other")),
]


@pytest.mark.parametrize(("text", "line", "words"), MISTAKES, ids=[m[0].strip().splitlines()[-1] for m in MISTAKES])
def test_a_mistake_names_file_line_and_the_right_name(
    tmp_path: Path, text: str, line: int, words: tuple[str, ...]
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        assemble([read_config("digits"), read_yaml(path)])
    message = str(caught.value)
    assert message.startswith(f"{path}:{line}: ")
    assert all(word in message for word in words), message


def test_a_mistake_on_the_command_line_names_the_flag_and_not_the_file_under_it() -> None:
    below = Layer(
        {"sampler": {"name": "heun", "steps": 3}}, {"sampler.name": "low.yaml:2", "sampler.steps": "low.yaml:3"}
    )
    for words in ("sampler=huen", "sampler.name=huen", "sampler.stepz=1", "sampler.steps=no", "train.steps=-1"):
        with pytest.raises(UserError, match=f"^--set {words}: "):
            assemble([below, read_assignments([words])])


@pytest.mark.parametrize("text", ["- a\n- b\n", "only words\n"])
def test_a_file_without_keys_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "odd.yaml").write_text(text)
    with pytest.raises(UserError, match=r"odd.yaml: expected keys and values"):
        read_yaml(tmp_path / "odd.yaml")


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"mine\.yaml"):
        read_yaml(tmp_path / "mine.yaml")
    with pytest.raises(UserError, match=r"no file .*mien\.yaml.* Did you mean 'mine\.yaml'\?"):
        read_config(tmp_path / "mien.yaml")
    with pytest.raises(UserError, match=r"No preset or file 'digts'\. Did you mean 'digits'\?"):
        read_config("digts")


@pytest.mark.parametrize("text", ["steps", "=3", ".steps=3", "train.=3", "train..lr=1"])
def test_an_assignment_without_key_or_value_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="write key=value"):
        read_assignments([text])


def test_the_order_of_a_name_and_its_fields_does_not_matter() -> None:
    words = ["sampler=euler", "sampler.steps=7", "sampler.grid=power", "sampler.grid.rho=3"]
    wanted = assemble([read_config("digits"), read_assignments(words)])
    assert wanted.sampler == registries["samplers"].create("euler", steps=7, grid={"name": "power", "rho": 3})
    for order in itertools.permutations(words):
        assert assemble([read_config("digits"), read_assignments(order)]) == wanted


def test_fields_alone_are_the_default_components() -> None:
    made = assemble([Layer({"sampler": {"steps": 4}, "backbone": {"depth": 2}})])
    assert made.sampler == registries["samplers"].create("heun", steps=4)
    assert made.backbone == registries["backbones"].create("sit-b/2", depth=2)


def test_defaults_that_follow_from_others() -> None:
    for name in registries["targets"]:
        config = assemble([Layer({"target": name})])
        assert (
            config.weight.name == {"velocity": "velocity", "score": "noise", "noise": "noise", "data": "velocity"}[name]
        )
    for name, cls in registries["samplers"].items():
        config = assemble([Layer({"sampler": name})])
        own = {"dpm++-2m-sde": "kl"}
        assert config.diffusion.name == own.get(name, "sigma" if cls.stochastic else "zero")


@pytest.mark.parametrize("name", sorted(presets))
def test_every_preset_is_valid(name: str) -> None:
    config = assemble([read_config(name)])
    assert config.train.steps > 0 and slug(config)
    assert set(read_config(name).where.values()) <= {
        f"{presets[name]}:{i}" for i in range(1, len(presets[name].read_text().splitlines()) + 1)
    }


# Each changes what a training's weights depend on.
TRAINS = [
    "interp=gvp", "target=score", "weight=noise", "timestep=logit-normal", "coupling=minibatch-ot", "backbone.depth=2",
    "data.size=401", "data.law=moons", "train.steps=41", "train.batch=17", "train.lr=2e-3", "train.weight_decay=0.1",
    "train.betas=[0.9, 0.99]", "train.warmup=1", "train.clip=1", "train.ema=0.9", "train.ema=[0.9, 0.99]", "train.ema_warmup=false", "weight.floor=0.1", "train.posthoc=[0.1]", "train.posthoc_every=2", "train.posthoc_dtype=float16", "train.seed=1", "train.accumulate=2",
    "train.schedule=cosine", "train={schedule: linear, decay: 0.5}", "train={schedule: linear, lr_end: 1e-5}",
    "train.nonfinite=skip", "train.precision=bf16", "train.tf32=false", "train.init=other",
]  # fmt: skip
# Each changes the samples of a training, but not its weights.
SAMPLES = [
    "sampler=euler", "sampler.steps=49", "sampler.grid=power", "sampler=euler-maruyama", "guidance=cfg", "sample.n=9",
    "sample.seed=1", "sample.weights=raw", "sample.ema=0.1", "sample.labels=balanced", "sampler.t1=0.9",
]  # fmt: skip
# Each changes neither.
NOTHING = [
    "metric=mmd", "sample.batch=7", "run.device=cpu", "run.log_every=3", "run.checkpoint_every=3", "run.sample_every=0",
    "run.keep=5", "run.track=true", "run.folder=elsewhere", "run.threads=2", "run.compile=true", "run.workers=0",
    "run.parallel=fsdp", "run.keep_samples=true", "run.log_model=true",
]  # fmt: skip


def test_identities_depend_on_the_settings_that_matter_only(tmp_path: Path) -> None:
    base = tiny(tmp_path)
    trainings = {words: training_identity(tiny(tmp_path, words)) for words in TRAINS}
    assert len({training_identity(base), *trainings.values()}) == len(TRAINS) + 1
    samplings = {words: sampling_identity(tiny(tmp_path, words), 40) for words in (*TRAINS, *SAMPLES)}
    assert len({sampling_identity(base, 40), *samplings.values()}) == len(TRAINS) + len(SAMPLES) + 1
    for words in SAMPLES + NOTHING:
        assert training_identity(tiny(tmp_path, words)) == training_identity(base), words
    for words in NOTHING:
        assert sampling_identity(tiny(tmp_path, words), 40) == sampling_identity(base, 40), words
    assert sampling_identity(base, 39) != sampling_identity(base, 40)


def test_every_setting_is_in_the_lists_above(tmp_path: Path) -> None:
    known = {key for words in TRAINS + SAMPLES + NOTHING for key in flat(read_assignments([words]).values)}
    heads = {key.partition(".")[0] for key in known}
    settings = {f"{group}.{key}" for group in ("train", "sample", "run") for key in tiny(tmp_path).plain()[group]}
    assert settings <= known
    # The loss has one value without a plugin, the autoencoder one without an extra; diffusion follows the sampler here.
    assert set(Config.model_fields) - heads == {"loss", "autoencoder", "diffusion"}


def test_only_samples_of_an_adaptive_solver_depend_on_the_batch(tmp_path: Path) -> None:
    for name, cls in registries["samplers"].items():
        one, two = (sampling_identity(tiny(tmp_path, f"sampler={name}", f"sample.batch={n}"), 1) for n in (7, 64))
        assert (one != two) == hasattr(cls, "rtol"), name


@pytest.mark.parametrize(
    "spelt",
    [
        "interp.name=linear", "timestep={name: uniform}", "train.weight_decay=0", "sampler.clip=derived", "sample.labels=none",
        "train.clip=null", "data.noise=null", "diffusion={name: zero, norm: 1}", "train.lr=0.001", "weight=velocity",
        "backbone.time_scale=1", "train.betas=[0.9, 0.999]", "sampler.grid={name: uniform}",
    ],
)  # fmt: skip
def test_an_explicit_default_is_the_same_run(tmp_path: Path, spelt: str) -> None:
    one, two = tiny(tmp_path), tiny(tmp_path, spelt)
    assert one == two and training_identity(one) == training_identity(two)
    assert sampling_identity(one, 1) == sampling_identity(two, 1)


def test_the_name_of_a_preset_means_its_fields() -> None:
    named = assemble([Layer({"backbone": "sit-s/4"})])
    fields = {"name": "sit", "patch_size": 4, "hidden_size": 384, "depth": 12, "num_heads": 6}
    spelt = assemble([Layer({"backbone": fields})])
    assert training_identity(named) == training_identity(spelt)
    assert label(spelt.backbone) == "sit-s/4"
    assert slug(spelt) == "digits-linear-velocity-sit-s-4"


def test_identities_are_stable() -> None:
    # A change here orphans every run on every disk.
    text = '[{"a":null,"b":[1,2.0]}]'
    assert identity({"b": [1, 2.0], "a": None}) == hashlib.sha256(text.encode()).hexdigest()[:12]
    assert identity({"a": None, "b": [1, 2.0]}) == identity({"b": [1, 2.0], "a": None})
    assert identity(1) != identity(1.0) != identity("1")


@pytest.mark.parametrize("registry", sorted(registries))
def test_labels_name_every_component_that_needs_no_field(registry: str) -> None:
    for name in registries[registry]:
        try:
            component = registries[registry].create(name)
        except UserError:
            continue
        # Two names may stand for one component (an alias); then either is right.
        again = registries[registry].create(label(component))
        assert again == component


NAMED = {key: sorted(registries[plural]) for key, plural in (("interp", "interpolants"), ("target", "targets"))}


@given(
    st.sampled_from(sorted(set(registries["backbones"]) - {"exact"})),
    st.fixed_dictionaries({key: st.sampled_from(names) for key, names in NAMED.items()}),
    st.lists(st.text(max_size=60), max_size=5),
)
def test_names_of_runs_are_folder_names_everywhere(backbone: str, parts: dict[str, str], words: list[str]) -> None:
    for text in (slug(assemble([Layer({"backbone": backbone, **parts})])), hyphenated(words)):
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", text) and len(text) <= 80
        assert file_name(f"{text}-0123456789ab") == f"{text}-0123456789ab"


@pytest.mark.parametrize(
    "words",
    [
        (), ("sampler=euler-maruyama", "diffusion=kl", "diffusion.norm=0.5"), ("sample.labels=[1, 2]", "train.clip=0.5"),
        ("metric=[mmd, sliced-wasserstein]", "guidance=cfg", "guidance.scale=2"), ("sampler.grid={name: power, rho: 3}",),
        ("sampler=euler-maruyama", "diffusion=kl-eta"), ("run.threads=2",),
    ],
)  # fmt: skip
def test_a_configuration_written_is_read_back_equal(tmp_path: Path, words: tuple[str, ...]) -> None:
    config = tiny(tmp_path / "runs", *words)
    write_config(tmp_path, config)
    again = read_config_of(tmp_path)
    assert again == config
    assert training_identity(again) == training_identity(config)
    write_config(tmp_path / "twice", again)
    assert (tmp_path / "twice/config.yaml").read_bytes() == (tmp_path / "config.yaml").read_bytes()


@pytest.mark.parametrize(
    "text",
    [
        "train.betas=[0.9,1.0]",
        "train.warmup=9000000000000000000",
        "train.accumulate=9000000000000000000",
        "run.keep=9000000000000000000",
        "run.log_every=9000000000000000000",
        "train.betas=[1.5,0.9]",
        "train.betas=[true,0.9]",
        "train.weight_decay=.inf",
        "train.clip=.inf",
        "train.steps=true",
        "train.steps=10000000000000",
        "train.batch=1000000000000",
        "train.seed=9223372036854775808",
        "sample.n=true",
        "sample.n=10000000000000000000000",
        "sample.batch=1000000000000",
        "run.keep=true",
    ],
)
def test_settings_that_would_fail_in_the_middle_of_the_work_are_refused(text: str) -> None:
    with pytest.raises(UserError, match=re.escape(text)):
        assemble([read_assignments([text])])
    assert assemble([read_assignments(["run.compile=true", "run.track=false", "run.keep_samples=true"])]).run.compile


REQUIRED = {"shape": (1, 8, 8), "size": 8, "path": "absent"}
WHOLE = [
    (registry.plural, name, field.name)
    for registry in registries.values()
    for name in registry
    if registry.plugin(name) is None
    for field in dataclasses.fields(registry[name])
    if re.fullmatch(r"int( \| None)?", str(field.type)) and field.name != "seed"
]


@pytest.mark.parametrize(("plural", "name", "field"), WHOLE)
def test_each_whole_number_of_a_component_has_a_bound(plural: str, name: str, field: str) -> None:
    cls = registries[plural][name]
    needed = {
        f.name: REQUIRED[f.name]
        for f in dataclasses.fields(cls)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    with pytest.raises(UserError, match=rf"{field} must be at most"):
        registries[plural].create(name, **needed | {field: 10**15})


@pytest.mark.parametrize(
    "group", [TrainSettings, SampleSettings, RunSettings, Study, Search, Screen, Confirm, SearchGoal]
)
def test_each_whole_number_of_the_settings_has_a_bound(group: type[Settings]) -> None:
    for name, field in group.model_fields.items():
        if "int" in re.findall(r"\w+", str(field.annotation).replace("<class 'int'>", "int")) and name != "labels":
            for value in (10**30, (10**30, 10**30 + 1)):
                with pytest.raises(ValidationError):
                    group.model_validate({name: value})


@pytest.mark.parametrize("times", ["[false, 1.0]", "[[true]]", "[0.0, 99999999999999999999]"])
def test_the_numbers_of_a_list_are_checked_as_a_number_is(times: str) -> None:
    with pytest.raises(UserError, match="times: a number"):
        assemble([read_assignments([f"sampler.grid={{name: explicit, times: {times}}}"])])
