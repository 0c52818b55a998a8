"""What people install and read first: recipes by name, listings, versions, requirements, and the files around the package."""

import ast
import configparser
import importlib.metadata
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import yaml

import flax_switch as fs
from flax_switch import cli
from flax_switch.commands.options import command_of
from flax_switch.config import ConfigError, recipes, shipped
from flax_switch.config.sizes import count_parameters, shorten

ROOT = Path(__file__).parents[1]
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")
PYTHONS = re.findall(r"Python :: (3\.\d+)$", SETUP["metadata"]["classifiers"], re.M)
EXTRAS = SETUP["options.extras_require"]


def printed(capsys, *argv: str) -> str:
    assert cli.main(list(argv)) == 0
    return capsys.readouterr().out


# --- recipes by name
def test_a_name_is_the_packages_recipe_wherever_one_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = recipes.load_recipe(ROOT / "configs" / "tiny.py")
    (tmp_path / "tiny").mkdir()  # a folder of that name is in nobody's way
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "tiny.py").write_text("raise AssertionError('not this one')")
    assert recipes.load_recipe("tiny") == recipes.load_gin(["tiny"]) == expected


@pytest.mark.parametrize("name", ["tiny", "configs/tiny.py"])
def test_a_gin_file_of_ones_own_names_a_recipe_by_name_or_path(name, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT if "/" in name else tmp_path)
    gin = tmp_path / "mine.gin"
    gin.write_text(f"recipe.base = {name!r}\ntrain.steps = 7\n")
    assert recipes.load_gin([gin]) == recipes.load_recipe("tiny", ["train.steps=7"])


def test_a_file_in_the_working_directory_comes_before_the_packages_for_a_gin_file_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, changed = re.subn(r"(?<=TrainConfig\()steps=\d+", "steps=77", (ROOT / "configs" / "tiny.py").read_text())
    assert changed == 1
    (tmp_path / "base.py").write_text(text)
    (tmp_path / "mine.gin").write_text("recipe.base = 'base.py'\n")
    assert recipes.load_gin(["mine.gin"]).train.steps == 77


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--config", "tinny"], "There is no recipe tinny. Did you mean --config tiny?"),
        (["--config", "switch_base8"], "Did you mean --config switch_base_8?"),
        (["--config", "tiny.py"], "There is no recipe tiny.py here. The one that comes with the package is --config tiny."),
        (["--config", "configs/tiny.py"], "There is no recipe configs/tiny.py here. The one that comes with"),
        (["--config", "mine/recipee.py"], "Did you mean mine/recipe.py?"),
        (["--config", "qqqq"], "There is no recipe qqqq. "),
        (["--config", "mine"], "There is no recipe mine. "),
        (["--gin-file", "tinny"], "There is no gin file tinny. Did you mean --gin-file tiny?"),
        (["--gin-file", "base.gin"], "recipe.base = 'tinny'"),
    ],
)
def test_a_mistyped_recipe_is_an_error_with_the_nearest_and_where_the_list_is(given, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "setup.py").write_text("")  # lies about, and is no recipe
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "recipe.py").write_text("")
    (tmp_path / "base.gin").write_text("recipe.base = 'tinny'\n")
    assert cli.main(["pretrain", "--workdir", "run", *given]) == 2
    error = capsys.readouterr().err
    assert message.replace("/", str(Path("/"))) in error
    assert "`flax-switch recipes` lists those that come with the package." in error
    assert "setup" not in error
    assert not (tmp_path / "run").exists()


def test_without_recipes_an_installation_says_where_they_should_be(tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, "_PACKAGE", tmp_path / "flax_switch")
    (tmp_path / "configs").mkdir()  # of somebody else
    with pytest.raises(ConfigError, match="not where this installation should have them"):
        shipped.folder()


# --- listings
def test_recipes_are_listed_with_purpose_size_and_hardware(capsys):
    rows = {row["name"]: row for row in json.loads(printed(capsys, "recipes", "--json"))}
    assert sorted(rows) == sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
    for name, row in rows.items():
        text = runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["__doc__"]
        assert f"flax-switch {row['command']} --config configs/{name}.py" in text
        assert row["purpose"] == text.splitlines()[0] and row["purpose"].endswith(".")
        assert row["hardware"] and " ".join(text.split()).count(row["hardware"]) == 1
        assert (row["parameters"] is None) == (row["command"] == "finetune")
    assert (rows["tiny"]["parameters"], rows["tiny"]["active_parameters"]) == (3_740_032, 1_905_024)


def test_the_listing_for_people_has_every_name_and_fits_a_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = printed(capsys, "recipes")
    assert all(f"\n{name} " in f"\n{text}" for name in shipped.names())
    assert "tiny                               pretrain  3.74 M parameters (a token: 1.91 M)\n" in text
    assert "Hardware: 2 CPU cores." in text
    assert max(map(len, text.splitlines())) <= 80
    assert max(map(len, printed(capsys, "presets").splitlines())) <= 80


@pytest.mark.parametrize("name", shipped.names())
def test_a_recipes_docstring_is_shown_by_name_with_commands_that_can_be_copied(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    told, text = printed(capsys, "recipes", name), re.sub(r"configs/(\w+)\.py", r"\1", shipped.describe(name).text)
    assert told.replace("\\\n", " ").split() == text.split()
    assert f"flax-switch {command_of(recipes.load_recipe(name))} --config {name} " in told
    commands = [line for line in told.splitlines() if re.match(r"(Command:)? +(flax-switch|python|--) *\S*", line)]
    assert [line for line in told.splitlines() if len(line) > 80 and line not in commands] == []
    joined = [line.split() for line in told.replace("\\\n", " ").splitlines()]
    assert all(line.split() in joined for line in text.splitlines() if re.match(r"(Command:)? +(flax-switch|python) ", line))


def test_a_recipe_is_described_as_json_and_a_mistyped_name_suggests_the_nearest(capsys):
    assert json.loads(printed(capsys, "recipes", "tiny", "--json"))["name"] == "tiny"
    assert cli.main(["recipes", "tinny"]) == 2
    assert "Did you mean 'tiny'?" in capsys.readouterr().err


def test_presets_are_listed_with_their_sizes(capsys):
    lines = printed(capsys, "presets").splitlines()[1:]
    assert [line.split()[0] for line in lines] == list(fs.PRESETS)
    assert "switch-c-2048            1.57 T  1.75 B 15+15 (15+15)    2080  6144 2048, top 1" in lines
    found = json.loads(printed(capsys, "presets", "--json"))
    assert {name: fs.SwitchConfig.from_dict(row["config"]) for name, row in found.items()} == fs.PRESETS
    assert found["switch-base-8"]["parameters"] == 619_339_008


@pytest.mark.parametrize("command", ["recipes", "presets"])
def test_listings_start_no_jax(command):
    code = f"import sys; from flax_switch.cli import main; main([{command!r}]); sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode == 0


# --- sizes
def counted(config: fs.SwitchConfig) -> tuple[int, int]:
    """Total and active parameters, by the shapes that the module itself declares."""
    from flax_switch.nn.init import init_params

    shapes = jax.eval_shape(lambda key: init_params(fs.SwitchTransformer(config), key), jax.random.key(0))
    total = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    paths = jax.tree_util.tree_leaves_with_path(shapes)
    experts = sum(leaf.size for path, leaf in paths if any(getattr(key, "key", "") == "expert" for key in path))
    return total, total - experts + experts * config.num_selected_experts // config.num_experts


SMALL = fs.SwitchConfig(
    vocab_size=50, d_model=8, num_heads=3, d_kv=4, d_ff=10, num_encoder_layers=4, num_decoder_layers=2,
    num_sparse_encoder_layers=2, num_sparse_decoder_layers=1, num_experts=6,
)  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_sparse_encoder_layers": 0, "num_sparse_decoder_layers": 0},
        {"mlp_activations": ("gelu_new", "linear"), "num_selected_experts": 2, "tie_word_embeddings": False},
        {"expert_d_ff": 14, "shared_expert": True, "router_bias": True},
        {"extra_mlp": True, "expert_d_ff": 14},
        {"separate_embeddings": True, "tie_word_embeddings": False},
        {"relative_attention_per_layer": True, "relative_attention_num_buckets": 16},
        {"router_type": "experts_choose", "scan_layers": True},
        {"encoder_sparse_layers": (0,), "decoder_sparse_layers": (0, 1)},
    ],
    ids=lambda changes: ",".join(changes) or "plain",
)
def test_parameters_are_counted_as_the_module_declares_them(changes):
    config = SMALL.replace(**changes)
    size = count_parameters(config)
    assert (size.total, size.active) == counted(config)


@pytest.mark.slow
@pytest.mark.parametrize("name", fs.PRESETS)
def test_every_presets_parameters_are_counted_as_its_module_declares_them(name):
    size = count_parameters(fs.PRESETS[name])
    assert (size.total, size.active) == counted(fs.PRESETS[name])


@pytest.mark.parametrize(
    ("count", "text"),
    [(7, "7"), (999, "999"), (1000, "1.00 K"), (970_496, "970 K"), (999_600, "1.00 M"), (9_996_000, "10.0 M"),
     (26_299_000_000, "26.3 B"), (1_570_000_000_000, "1.57 T"), (2_500_000_000_000_000, "2500 T")],
)  # fmt: skip
def test_counts_are_shortened_to_three_digits(count, text):
    assert shorten(count) == text


# --- versions and requirements
def test_the_version_is_the_same_everywhere(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"flax_switch {fs.__version__}\n"
    module = subprocess.run([sys.executable, "-m", "flax_switch", "--version"], cwd=ROOT, capture_output=True, text=True)
    assert module.stdout == f"flax_switch {fs.__version__}\n"
    assert SETUP["metadata"]["version"] == "attr: flax_switch.__version__"
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == fs.__version__


STANDARD_LATER = {"compression"}  # Python 3.14's; imported there alone
# Whose a module is where its distribution is not installed: an optional one, on a Python it has no wheel for.
OPTIONAL = {"gin": ["gin-config"], "backports": ["backports.zstd"]}


def imported() -> dict[str, set[str]]:
    """Distribution names a module of others may come from, by the module as it is imported, with the files that do."""
    found: dict[str, set[str]] = {}
    for path in (ROOT / "flax_switch").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            for name in names:
                top = name.split(".")[0]
                if top not in {"flax_switch", *sys.stdlib_module_names, *STANDARD_LATER}:
                    found.setdefault(top, set()).add(path.name)
                    if name.endswith("_pb2"):
                        found.setdefault("google.protobuf", set()).add(path.name)  # what generated messages import
    return found


def required(text: str) -> set[str]:
    """The names of requirements, written in one way."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return {re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", line).group().lower()) for line in lines}


def test_every_import_is_a_requirement_and_every_requirement_is_imported():
    places = OPTIONAL | importlib.metadata.packages_distributions() | {"google.protobuf": ["protobuf"]}
    core, extra = required(SETUP["options"]["install_requires"]), required("\n".join(EXTRAS.values()))
    wanted = set()
    for module, files in imported().items():
        owners = required("\n".join(places.get(module, [module])))
        assert owners & (core | extra), f"{module} is imported in {sorted(files)}, and no requirement in setup.cfg brings it"
        wanted |= owners
    assert core <= wanted, f"required and never imported: {core - wanted}"


def test_heavy_and_optional_libraries_stay_in_extras():
    core = required(SETUP["options"]["install_requires"])
    assert not core & {"torch", "transformers", "safetensors", "tensorflow", "matplotlib", "gin-config", "pyarrow"}


def test_setuptools_reads_setup_cfg_without_a_complaint(monkeypatch):
    from setuptools.dist import Distribution

    monkeypatch.chdir(ROOT)
    distribution = Distribution({"name": "flax_switch"})
    distribution.parse_config_files(["setup.cfg"])
    assert distribution.metadata.version == fs.__version__
    assert set(distribution.extras_require) == set(EXTRAS)


# --- the files around the package
def test_the_licence_is_apache_2():
    text = (ROOT / "LICENSE").read_text()
    assert text.split()[:4] == ["Apache", "License", "Version", "2.0,"] and "END OF TERMS AND CONDITIONS" in text
    assert SETUP["metadata"]["license_expression"] == "Apache-2.0" and (ROOT / "flax_switch" / "py.typed").read_text() == ""


@pytest.mark.parametrize(
    "path",
    sorted((ROOT / ".github").rglob("*.yml")) + [ROOT / ".pre-commit-config.yaml", ROOT / "CITATION.cff"],
    ids=lambda p: p.name,
)
def test_files_of_yaml_are_yaml(path):
    assert isinstance(yaml.safe_load(path.read_text()), dict)


def steps(workflow: str) -> list[dict]:
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / workflow).read_text())["jobs"]
    return [step for job in jobs.values() for step in job["steps"]]


@pytest.mark.parametrize("workflow", ["tests.yml", "release.yml"])
def test_workflows_run_scripts_and_tests_that_there_are(workflow):
    for step in steps(workflow):
        assert ("run" in step) != ("uses" in step)
        for path in re.findall(r"\b(?:scripts|tests)/[\w./]+", step.get("run", "")):
            assert (ROOT / path).exists(), path
        for extra in re.findall(r"\.\[(\w+)\]", step.get("run", "")):
            assert extra in EXTRAS


def test_the_workflow_tests_every_python_that_is_promised_and_both_other_systems():
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text())["jobs"]
    assert jobs["quick"]["strategy"]["matrix"]["python"] == PYTHONS
    assert jobs["other-systems"]["strategy"]["matrix"]["os"] == ["macos-latest", "windows-latest"]


def test_a_release_is_tested_before_it_is_published_without_a_token():
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())["jobs"]
    commands = [step.get("run", "") for step in jobs["build"]["steps"]]
    assert "python scripts/wheel_test.py --full --dist dist" in commands
    assert jobs["publish"]["needs"] == "build" and jobs["publish"]["permissions"] == {"id-token": "write"}
    assert "secrets." not in (ROOT / ".github" / "workflows" / "release.yml").read_text()


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions with what follows them."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.M).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line]


def test_the_dockerfile_has_known_instructions_and_installs_extras_that_there_are():
    found = instructions()
    assert {name for name, _ in found} <= {"ARG", "FROM", "WORKDIR", "COPY", "RUN", "USER", "CMD"}
    assert [name for name, _ in found][:2] == ["ARG", "FROM"]
    python, extras = (value.partition("=")[2] for name, value in found if name == "ARG")
    assert python in PYTHONS
    launching = (ROOT / "docs" / "launching.md").read_text()
    built = re.findall(r"EXTRAS=([\w,]+)", launching + (ROOT / "Dockerfile").read_text())
    installed = next(value for name, value in found if name == "RUN" and "EXTRAS" in value)
    for group in (extras, *built, *re.findall(r"\[([\w,]+),\$\{EXTRAS\}\]", installed)):
        assert set(group.split(",")) <= set(EXTRAS), group
    assert json.loads(found[-1][1]) == ["flax-switch", "recipes"]


def test_the_kubernetes_job_runs_a_command_and_sets_variables_that_there_are():
    launching = (ROOT / "docs" / "launching.md").read_text()
    job = yaml.safe_load(re.search(r"```yaml\n(.*?)```", launching, re.S).group(1))
    spec = job["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    assert f"--tag {container['image']} ." in launching
    program, command, *argv = container["command"]
    args = cli.build_parser(command).parse_args([command, *argv])
    assert (program, args.distributed) == ("flax-switch", True)
    recipes.load_recipe(args.config)
    variables = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert set(variables) == {"JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"}
    assert all(f"`{name}`" in launching for name in variables)
    assert int(variables["JAX_NUM_PROCESSES"]) == spec["completions"] == spec["parallelism"]
    name = job["metadata"]["name"]
    assert variables["JAX_COORDINATOR_ADDRESS"].startswith(f"{name}-0.{spec['template']['spec']['subdomain']}:")
