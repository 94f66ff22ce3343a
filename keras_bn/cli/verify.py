"""`keras-bn verify`: prove that the layer computes what Keras's computes."""

from rich.console import Console
from rich.progress import track

from keras_bn.cli import output
from keras_bn.verify import cases, judge, table


def run(arguments):
    settings, progress = cases.cases(arguments.quick), Console(stderr=True)
    running = track(
        judge.verify(settings, arguments.seed),
        "Comparing",
        total=len(settings),
        console=progress,
        transient=True,
        disable=not progress.is_terminal,
    )
    return show(arguments, running)


def show(arguments, records):
    """Print and write the records of a proof, which may be an iterator.

    Returns:
        The exit status: 0 if the layers agree.
    """
    console = output.console(arguments)
    environment = judge.environment()
    console.print(table.title(environment))
    records = list(records)
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
