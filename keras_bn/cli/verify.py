"""`keras-bn verify`: prove that the layer computes what Keras's computes."""

from rich.console import Console
from rich.progress import track

from keras_bn.cli import output
from keras_bn.cli.options import add_json, at_least
from keras_bn.verify import cases, judge, table


def add(commands):
    """Add the command."""
    parser = commands.add_parser(
        "verify",
        help="prove on this machine that the layer computes what Keras's does",
        description="Compare keras_bn.BatchNormalization with Keras's layer on this "
        "machine and device: outputs, gradients and moving statistics over shapes, "
        "dtypes and modes, against float64 NumPy. The exit status is 1 if any "
        "comparison fails.",
    )
    parser.add_argument("--quick", action="store_true", help="fewer combinations")
    parser.add_argument(
        "--seed", type=at_least(0), default=0, help="of the random numbers (0)"
    )
    add_json(parser)
    parser.set_defaults(run=_run, parser=parser)


def _run(arguments):
    output.check_json(arguments)
    console = output.console(arguments)
    environment = judge.environment()
    console.print(table.title(environment))
    settings, progress = cases.cases(arguments.quick), Console(stderr=True)
    running = track(
        judge.verify(settings, arguments.seed),
        "Comparing",
        total=len(settings),
        console=progress,
        transient=True,
        disable=not progress.is_terminal,
    )
    records = list(running)
    passed = judge.passed(records)
    console.print(table.table(records))
    console.out(f"\n{table.RULE}\n{table.verdict(records, passed)}")
    results = {
        "environment": environment,
        "seed": arguments.seed,
        "passed": passed,
        "records": [record.to_dict() for record in records],
    }
    output.write_json(arguments, results)
    return 0 if passed else 1
