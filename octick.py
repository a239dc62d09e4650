"""Octick's front door: the root of the command line, and the client library's public names.

Each package brings its commands in its own ``cli.py``; they are imported only when called, so
that ``octick --help`` and a typo cost nothing.
"""

from __future__ import annotations

import gc
import importlib
import sys
from typing import TYPE_CHECKING, Any, Final

import click

from feeds.errors import InputError

if TYPE_CHECKING:
    from engine.client import Alert, EngineState, Signal, SignalClient

__all__ = ["Alert", "EngineState", "InputError", "Signal", "SignalClient", "main"]
__version__ = "0.1.0"

EXIT_CHECK_FAILED: Final = 1
EXIT_BAD_INPUT: Final = 2
# Start-up makes hundreds of thousands of objects and hardly a cycle: look for them less often.
COLLECT_EVERY: Final = 50_000

# name → (module, function, one-line help); groups are nested dicts.
_COMMANDS: Final[dict[str, Any]] = {
    "run": ("engine.cli", "run", "Run the engine as a daemon."),
    "subscribe": ("engine.cli", "subscribe", "Watch signals as they are published."),
    "doctor": ("engine.cli", "doctor", "Check this machine and what would make it slow."),
    "publish": ("feeds.cli", "publish", "Put a simulator, tape or recording on ZeroMQ."),
    "replay": ("replay.cli", "replay", "Run the engine over recorded tapes."),
    "why": ("replay.cli", "why", "Tell a signal's whole story from its tape."),
    "compile": ("benchmarks.cli", "compile_kernels", "Compile every kernel ahead of its use."),
    "demo": ("benchmarks.cli", "demo", "Simulator, daemon and subscriber, then a replay."),
    "backend": {
        "": "What runs the models: which is here, and whether it keeps its promises.",
        "check": ("engine.backend_cli", "check", "Run the conformance suite on a backend."),
        "list": ("engine.backend_cli", "list_command", "Say which backends open here."),
    },
    "control": {
        "": "Command a running engine.",
        "arm": ("engine.control_cli", "arm", "Let it go on after a halt."),
        "demote": ("engine.control_cli", "demote", "Let FP32 answer."),
        "halt": ("engine.control_cli", "halt", "Nothing is tradable from the next message on."),
        "keys": ("engine.control_cli", "keys", "Make a CURVE key pair."),
        "promote": ("engine.control_cli", "promote", "Let INT8 answer again."),
        "recalibrate": ("engine.control_cli", "recalibrate", "Calibrate anew and swap."),
        "rollback": ("engine.control_cli", "rollback", "Bring the model before back."),
        "status": ("engine.control_cli", "status", "Say how the engine is."),
        "swap": ("engine.control_cli", "swap", "Put another bundle in the serving one's place."),
    },
    "fpga": {
        "": "From a bundle to a circuit, and what it takes on a device.",
        "build": ("engine.backends.fpga.cli", "build", "Synthesise, place, route and time."),
        "verilog": ("engine.backends.fpga.cli", "verilog", "Write the SystemVerilog."),
    },
    "tape": {
        "": "Make, inspect, compare and export tapes.",
        "check": ("replay.cli", "check", "Rebuild the book and hold it against the recording."),
        "convert": ("feeds.tape_cli", "convert", "Convert a raw recording to a tape."),
        "diff": ("feeds.tape_cli", "diff", "Name the first record in which two tapes differ."),
        "export": ("feeds.tape_cli", "export", "Write a tape as Parquet."),
        "info": ("feeds.tape_cli", "info", "Say what a tape holds."),
        "seal": ("feeds.tape_cli", "seal", "Compress a finished tape."),
        "verify": ("feeds.tape_cli", "verify", "Check every record of a tape."),
    },
    "model": {
        "": "From tapes to a verified INT8 bundle.",
        "info": ("models.bundle_cli", "info", "Say what a bundle is."),
        "quantize": ("models.bundle_cli", "quantize", "Quantise a trained network to a bundle."),
        "recalibrate": ("models.recalibrate_cli", "recalibrate", "New ranges from recent tapes."),
        "reference": ("models.cli", "reference", "Rebuild the reference bundle."),
        "report": ("models.bundle_cli", "report", "Compare bundles in one table."),
        "train": ("models.cli", "train", "Train a network on tapes."),
        "tune": ("models.search_cli", "tune", "Search layers, precisions, observers and scales."),
        "verify": ("models.bundle_cli", "verify", "Verify a bundle in three levels."),
    },
    "bench": {
        "": "Measure; every figure in the README comes from here.",
        "backends": ("benchmarks.cli", "backends", "Every backend here, and its rivals."),
        "bits": ("benchmarks.cli", "bits", "Whether every exact backend gives the same bits."),
        "calibration": ("benchmarks.cli", "calibration", "How many calibration rows are enough."),
        "crossover": ("benchmarks.parts_cli", "crossover", "From which size on INT8 beats FP32."),
        "convert": ("benchmarks.cli", "convert", "Raw lines a second of the converter."),
        "deeplob": ("benchmarks.cli", "deeplob", "Public DeepLOB weights, INT8 against FP32."),
        "drift": ("benchmarks.cli", "drift", "Delay of drift alerts, and false ones in a day."),
        "day": ("benchmarks.cli", "day", "A simulated day that crosses a recalibration."),
        "features": ("benchmarks.parts_cli", "features", "Nanoseconds an update of the features."),
        "halt": ("benchmarks.cli", "halt", "How soon a halt takes effect at full load."),
        "latency": ("benchmarks.speed_cli", "latency", "Tick to signal, beside a plain echo."),
        "overload": (
            "benchmarks.speed_cli",
            "overload",
            "What becomes of too many messages.",
        ),
        "inference": ("benchmarks.parts_cli", "inference", "Every architecture in every runtime."),
        "quiet": ("benchmarks.cli", "quiet", "A quiet market told from a silent feed."),
        "shadow": ("benchmarks.cli", "shadow", "What the FP32 shadow costs a tick."),
        "soak": ("benchmarks.daemon_cli", "soak", "Hours at twice the recorded peak."),
        "start": ("benchmarks.daemon_cli", "start", "From a start to READY, stage by stage."),
        "swap": ("benchmarks.cli", "swap", "Hot swaps under load."),
        "memory": ("benchmarks.cli", "memory", "Resident memory over a long replay."),
        "replay": ("benchmarks.cli", "replay", "Book levels, messages and signals a second."),
        "value-checks": ("benchmarks.cli", "value_checks", "What checking values costs a model."),
    },
}

_CLIENT_NAMES: Final = frozenset({"Alert", "EngineState", "Signal", "SignalClient"})


class _LazyGroup(click.Group):
    """A group whose commands are imported when called, listed from a table."""

    def __init__(self, *args: Any, table: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._table = table

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(name for name in self._table if name)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        entry = self._table.get(cmd_name)
        if not cmd_name or entry is None:
            return None
        if isinstance(entry, dict):
            return _LazyGroup(name=cmd_name, help=entry[""], table=entry)
        module, function, _ = entry
        command = getattr(importlib.import_module(module), function)
        assert isinstance(command, click.Command), f"{module}.{function} is no command"
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = []
        for name in self.list_commands(ctx):
            entry = self._table[name]
            rows.append((name, entry[""] if isinstance(entry, dict) else entry[2]))
        with formatter.section("Commands"):
            formatter.write_dl(rows)


cli = _LazyGroup(
    name="octick",
    table=_COMMANDS,
    help="Level II in, INT8 signal out: a deterministic real-time signal engine.",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
click.version_option(__version__, prog_name="octick")(cli)


def main() -> None:
    """Run the command line: 0 done, 1 a check failed, 2 wrong usage or input."""
    gc.set_threshold(COLLECT_EVERY)
    try:
        code = cli.main(prog_name="octick", standalone_mode=False)
    except click.exceptions.Abort:
        code = 130
    except click.ClickException as error:
        error.show()
        code = EXIT_BAD_INPUT
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        code = EXIT_BAD_INPUT
    except BrokenPipeError:
        sys.stderr.close()
        code = 0
    # The process ends here: without this the interpreter would walk all that Numba made, for 0.2 s.
    gc.freeze()
    sys.exit(code if isinstance(code, int) else 0)


def __getattr__(name: str) -> Any:
    if name in _CLIENT_NAMES:
        return getattr(importlib.import_module("engine.client"), name)
    raise AttributeError(f"module 'octick' has no attribute {name!r}")


if __name__ == "__main__":
    main()
