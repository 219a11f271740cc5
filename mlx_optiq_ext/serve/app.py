"""The application: every dialect's routes over one engine. Composition only."""

from litestar import Litestar
from litestar.openapi import OpenAPIConfig
from litestar.openapi.plugins import JsonRenderPlugin

from mlx_optiq_ext.serve.anthropic.routes import router as anthropic
from mlx_optiq_ext.serve.auth import Doors
from mlx_optiq_ext.serve.control.adapters import router as adapters
from mlx_optiq_ext.serve.control.routes import router as control
from mlx_optiq_ext.serve.dialect import answer_problem
from mlx_optiq_ext.serve.frame import Frame
from mlx_optiq_ext.serve.images import ImageReader
from mlx_optiq_ext.serve.models import router as models
from mlx_optiq_ext.serve.openai.routes import router as openai
from mlx_optiq_ext.serve.openapi import describe_bodies
from mlx_optiq_ext.serve.responses.routes import router as responses
from mlx_optiq_ext.serve.serving import Serving
from mlx_optiq_ext.types.nbytes import parse_nbytes
from mlx_optiq_ext.types.port import Engine
from mlx_optiq_ext.types.serve import ServeOptions

__all__ = ["create_app"]

_PLAIN = (JsonRenderPlugin(path=["/", "/openapi.json"]),)
"""The document alone: pages that draw it load scripts from elsewhere."""


def create_app(engine: Engine, options: ServeOptions, api_key: str | None) -> Litestar:
    """Make the ASGI application.

    Args:
        engine: Started; who closes it is the caller's business.
        options: As given to ``optiq serve``.
        api_key: None: any key, or none, will do.
    Raises:
        UsageError: ``max_body`` is no size, or an allowed host or origin is none.
    """
    serving = Serving(
        engine=engine, images=ImageReader(fetch=options.image_urls), adapter_folders=options.adapters_dir
    )
    app = Litestar(
        route_handlers=[openai, anthropic, responses, models, adapters, control],
        exception_handlers={Exception: answer_problem},
        state=serving.state(),
        request_max_body_size=parse_nbytes(options.max_body, flag="--max-body"),
        openapi_config=OpenAPIConfig(
            title="optiq", version=engine.status().version, path="/schema", render_plugins=_PLAIN
        ),
        # Logging is the caller's: Litestar would configure it for the whole process.
        logging_config=None,
    )
    describe_bodies(app)
    doors = Doors.of(options, api_key)
    app.asgi_handler = Frame(app.asgi_handler, doors, serving.clients, options.timeout_s)
    return app
