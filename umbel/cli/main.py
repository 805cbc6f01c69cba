"""`umbel …`: the command line, put together from one file per kind of command.

Commands of a site (`umbel.cli.site`, `adapt`, `adapter_serve`, `base`, `data`, `examples`, `bench`) run in the
engine's environment, those of the centre and of Flower (`umbel.cli.centre`, `adapter`, `registry`, `fleet`) in
Flower's. Heavy imports wait until a command needs them.
"""

import typer

from umbel.cli import adapt, adapter_serve, centre, data, site
from umbel.cli.adapter import adapter_app
from umbel.cli.base import base_app
from umbel.cli.bench import bench_app
from umbel.cli.examples import examples_app
from umbel.cli.fleet import fleet_app
from umbel.cli.registry import registry_app

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # they print locals, and a local may be private text
    help="Federated LoRA fine-tuning whose clients serve.",
)
for command in (site.check, site.serve, site.status, site.rollback, site.promote, centre.bundle):
    app.command(epilog={**site.EPILOGS, **centre.EPILOGS}[command.__name__])(command)
app.command(epilog=data.EPILOG)(data.data)
app.command(epilog=adapt.EPILOG)(adapt.adapt)
app.command(
    epilog=centre.EPILOGS["supernode"], context_settings={"allow_extra_args": True, "ignore_unknown_options": True}
)(centre.supernode)
adapter_serve.register(adapter_app)
app.add_typer(adapter_app, name="adapter")
app.add_typer(base_app, name="base")
app.add_typer(fleet_app, name="fleet")
app.add_typer(registry_app, name="registry")
app.add_typer(examples_app, name="examples")
app.add_typer(bench_app, name="bench")
