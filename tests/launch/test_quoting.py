"""Arguments reach every rank byte for byte, whatever they look like to a shell, a launcher or a parser of options.

Another launcher of ours: Slurm, in test_slurm.py.
"""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from ddetr.core.overrides import written
from ddetr.launch.command_line import LONGEST, decoded, encoded, split_off
from ddetr.launch.pdsh import check_hostfile, quoted

from tests.core.runs import SMALL
from tests.launch.hostile import hostile, recorded, recorder
from tests.launch.nodes import FIRST, on, ssh_servers

REPOSITORY = Path(__file__).resolve().parent.parent.parent
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"


def test_a_word_is_harmless_and_holds_all(tmp_path: Path) -> None:
    arguments = ["train", *hostile(tmp_path)]
    word = encoded(arguments)
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", word)
    assert decoded(word) == arguments
    for argument in hostile(tmp_path):
        assert decoded(encoded(["train", argument])) == ["train", argument]


@pytest.mark.integration
def test_only_what_stands_behind_the_first_dashes_is_passed_on() -> None:
    options, word = split_off(["--nnodes", "2", "--", "train", "--", "--nnodes"])
    assert options == ["--nnodes", "2"]
    assert decoded(word) == ["train", "--", "--nnodes"]
    for module in ("torchrun", "pdsh"):
        line = [sys.executable, "-m", f"ddetr.launch.{module}", "hostfile", "train"]
        result = subprocess.run(line, capture_output=True, text=True, check=False, timeout=60)
        assert result.returncode == 2
        assert result.stderr.count("\n") == 1
        assert "expected OPTION... -- train" in result.stderr


def test_arguments_that_no_launcher_can_pass_on_are_refused() -> None:
    assert len(encoded(["train", "x" * 80_000])) <= LONGEST
    with pytest.raises(ValueError, match=r"90007 bytes long, but a launcher passes on 90000 at most"):
        encoded(["train", "x" * 90_000])


@pytest.mark.integration
def test_what_is_quoted_is_one_word_of_a_shell(tmp_path: Path) -> None:
    """pdsh turns %% into % before the shell reads it."""
    words = hostile(tmp_path)
    line = "printf '%s\\0' " + " ".join(quoted(word).replace("%%", "%") for word in words)
    printed = subprocess.run(["sh", "-c", os.fsencode(line)], capture_output=True, check=True, cwd=tmp_path, timeout=60)
    assert printed.stdout.split(b"\0")[:-1] == [os.fsencode(word) for word in words]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "line",
    [
        "-oProxyCommand=touch$IFS/x slots=1",
        "node0;reboot slots=1",
        "$(reboot) slots=1",
        "node[0-3] slots=1",
        "node0,node1 slots=1",
        "^/etc/passwd slots=1",
        "node%h slots=1",
        "node0",
        "node0 slots=two",
        "node0 slots=1; reboot",
        "node0@-x slots=1",
    ],
)
def test_a_hostfile_holds_hosts_only(line: str, tmp_path: Path) -> None:
    file = tmp_path / "hostfile"
    file.write_text(
        f"# two nodes\n\nnode-0.cluster slots=8\nme@10.0.0.2 slots=8  # the second\nfe80::1 slots=8\n{line}\n"
    )
    with pytest.raises(ValueError, match=f"hostfile:6: expected `HOST slots=RANKS`, got {re.escape(repr(line))}"):
        check_hostfile(file)
    file.write_text(file.read_text().removesuffix(f"{line}\n"))
    check_hostfile(file)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize("script", ["local.sh", "torchrun.sh"])
def test_on_one_machine(script: str, tmp_path: Path) -> None:
    options = ["--ranks", "2"]
    if script == "torchrun.sh":
        options += ["--nodes", "1", "--node-rank", "0", "--master", f"127.0.0.1:{free_port()}"]
    arguments = ["tiny", *hostile(tmp_path)]
    environment = os.environ | recorder(tmp_path / "ranks") | {"PATH": PATH}
    line = [REPOSITORY / "launch" / script, *options, *arguments]
    result = subprocess.run(line, env=environment, cwd=tmp_path, capture_output=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr.decode()
    ranks = recorded(tmp_path / "ranks")
    assert sorted(ranks) == [0, 1]
    for rank in ranks.values():
        assert rank.arguments == [b"train", *map(os.fsencode, arguments)]
    assert not (tmp_path / "executed").exists()


@pytest.mark.slow
def test_over_ssh(nodes: dict[str, str], tmp_path: Path) -> None:
    """Also the name of the folder, and the variables that DeepSpeed exports by name and those of .deepspeed_env."""
    folder = tmp_path / f'it\'s $(touch executed) %h {os.fsdecode(b"%s" % bytes([0xE9]))} `a` & "b"'
    folder.mkdir()
    arguments = ["tiny", *hostile(tmp_path)]
    variables = {
        f"MLFLOW_{number}": word
        for number, word in enumerate(hostile(tmp_path))
        if word == word.strip()  # DeepSpeed strips values
    }
    (folder / ".deepspeed_env").write_text(f"FROM_FILE=$(touch {tmp_path}/executed) 'a' %h\n")
    (tmp_path / "hostfile").write_text("".join(f"{address} slots=1\n" for address in nodes.values()))
    with ssh_servers(nodes, tmp_path) as client:
        environment = os.environ | recorder(tmp_path / "ranks") | variables | {"PATH": f"{client}:{PATH}"}
        line = [*on(FIRST), REPOSITORY / "launch/ssh.sh", tmp_path / "hostfile", *arguments]
        result = subprocess.run(line, env=environment, cwd=folder, capture_output=True, timeout=300, check=False)
    assert result.returncode == 0, (result.stdout + result.stderr).decode(errors="replace")[-3000:]
    ranks = recorded(tmp_path / "ranks")
    assert sorted(ranks) == [0, 1]
    for rank in ranks.values():
        assert rank.arguments == [b"train", *map(os.fsencode, arguments)]
        assert rank.folder == os.fsencode(folder)
        assert rank.environment[b"FROM_FILE"] == f"$(touch {tmp_path}/executed) 'a' %h".encode()
        for name, value in variables.items():
            assert rank.environment[name.encode()] == os.fsencode(value)
    assert not (tmp_path / "executed").exists()
    assert not list(folder.glob("executed"))


def expanded(argument: str, variables: dict[str, str]) -> str:
    """What the kubelet makes of an argument, as Kubernetes documents it: `$(NAME)` is the variable's value, or stays as
    it is where there is none of that name; `$$` is `$`, so that `$$(NAME)` comes out as `$(NAME)`."""
    return re.sub(
        r"\$\$|\$\(([^)]*)\)",
        lambda found: "$" if found[0] == "$$" else variables.get(found[1], found[0]),
        argument,
    )


@pytest.mark.slow
def test_in_a_pod(tmp_path: Path) -> None:
    """The Job's own command: arguments behind it arrive as they are when each of their $ is written twice."""
    job = list(yaml.safe_load_all((REPOSITORY / "launch/kubernetes/train.yaml").read_text()))[1]
    (container,) = job["spec"]["template"]["spec"]["containers"]
    variables = {"JOB_COMPLETION_INDEX": "0", "HOME": "/root"}
    words = hostile(tmp_path)
    assert [expanded(word.replace("$", "$$"), variables) for word in words] == words
    assert expanded("$(HOME) $(ABSENT)", variables) == "/root $(ABSENT)"
    mine = {"--nnodes": "1", "--nproc-per-node": "2", "--master-addr": "127.0.0.1", "--master-port": str(free_port())}
    command = [expanded(part, variables) for part in container["command"]]
    command = [f"{name}={mine[name]}" if (name := part.partition("=")[0]) in mine else part for part in command]
    command[0] = sys.executable
    arguments = [*container["args"], *(word.replace("$", "$$") for word in words)]
    line = [*command, *(expanded(argument, variables) for argument in arguments)]
    environment = os.environ | recorder(tmp_path / "ranks")
    result = subprocess.run(line, env=environment, cwd=tmp_path, capture_output=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr.decode()
    ranks = recorded(tmp_path / "ranks")
    assert sorted(ranks) == [0, 1]
    for rank in ranks.values():
        assert rank.arguments == list(map(os.fsencode, [*container["args"], *words]))


@pytest.mark.slow
def test_on_ray(synthetic_shards: Path, tmp_path: Path) -> None:
    """The ranks get the configuration that the arguments made, as a whole; non-UTF-8 text is refused before."""
    words = [word for word in hostile(tmp_path) if word.isprintable() and "/" not in word and not word.startswith("-")]
    assert len(os.fsencode("".join(words))) < 255, "a folder's name"
    settings = {
        "data.cache": "~" + "".join(hostile(tmp_path, utf8=True)),
        "train.output": f"{tmp_path}/{''.join(words)}",
    }
    settings |= {"train.name": "$(touch executed) & 'x' %h", "data.train": str(synthetic_shards), "train.max_steps": 1}
    line = [sys.executable, "-m", "ddetr.launch.cli", "train", "tiny", *SMALL]
    line += [written(key, value) for key, value in settings.items()]
    result = subprocess.run([*line, "--ray"], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    config = yaml.safe_load((Path(settings["train.output"]) / settings["train.name"] / "config.yaml").read_text())
    for key in ("data.cache", "train.output", "train.name"):
        section, name = key.split(".")
        assert config[section][name] == settings[key]
    assert not (tmp_path / "executed").exists()
    line += [b"train.output=\xff", "--ray"]
    result = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("ddetr: 1 mistake(s) in tiny:\n  'train.output=\\udcff': "), result.stderr
    assert "Traceback" not in result.stderr
