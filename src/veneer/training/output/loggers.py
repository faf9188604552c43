"""Sends the records of metrics.jsonl on to TensorBoard, W&B, MLflow or trackio.

Only numbers and the run's settings are sent: no rows, no sample answers. (W&B and trackio add
figures of the machine, as configured.) Nothing is imported or sent unless `log` names it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module, util
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from veneer.errors import ConfigError

Name = Literal["tensorboard", "wandb", "mlflow", "trackio"]
PROJECT = "veneer"


@dataclass(frozen=True)
class Logger:
    """Sends the numbers of a step to a service; `close` ends the run there."""

    send: Callable[[dict[str, float], int], None]
    close: Callable[[], None]
    name: str = "logger"

    def __call__(self, record: Mapping[str, Any]) -> None:
        if values := numbers_of(record):
            self.send(values, int(record["step"]))


def open_loggers(names: Sequence[Name], *, out: Path, settings: Mapping[str, Any]) -> list[Logger]:
    """Opens a logger for each name. Raises ConfigError, before any is opened, for missing
    packages.
    """
    if missing := [name for name in names if util.find_spec(name) is None]:
        raise ConfigError(
            f"log asks for {', '.join(missing)}, not installed here",
            [],
            f"pip install 'veneer[{','.join(missing)}]', or leave it out of `log`.",
        )
    loggers: list[Logger] = []
    for name in names:
        try:
            opened = _OPENERS[name](import_module(name), out, flat(settings))
            loggers.append(replace(opened, name=name))
        except Exception as fault:  # their errors: no key, no server, a wrong version
            for logger in loggers:
                logger.close()
            raise ConfigError(
                f"{name} did not start: {fault}", [], f"Set {name} up, or leave it out of `log`."
            ) from fault
    return loggers


def numbers_of(record: Mapping[str, Any]) -> dict[str, float]:
    """Returns the numbers of a step or an evaluation as {"train/loss": ...}, {} for other
    records.
    """
    prefix = {"step": "train", "evaluation": "evaluation"}.get(record["kind"])
    if prefix is None:
        return {}
    return {
        f"{prefix}/{name}": float(value)
        for name, value in record.items()
        if name != "step" and isinstance(value, int | float) and not isinstance(value, bool)
    }


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens {"method": {"rank": 8}} to {"method.rank": 8}."""
    values: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            values |= flat(value, f"{prefix}{name}.")
        else:
            values[prefix + name] = value
    return values


def _tensorboard(module: ModuleType, out: Path, settings: dict[str, Any]) -> Logger:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(out / "tensorboard"))
    writer.add_text(
        "settings", "\n".join(f"    {name}: {value}" for name, value in settings.items())
    )

    def send(values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return Logger(send, writer.close)


def _wandb(module: ModuleType, out: Path, settings: dict[str, Any]) -> Logger:
    run = module.init(project=PROJECT, name=out.name, dir=str(out), config=settings)
    return Logger(lambda values, step: run.log(values, step=step), run.finish)


def _mlflow(module: ModuleType, out: Path, settings: dict[str, Any]) -> Logger:
    """Sends to the server in MLFLOW_TRACKING_URI: the small package of our extra opens no
    database.
    """
    module.set_experiment(PROJECT)
    module.start_run(run_name=out.name)
    module.log_params(settings)
    return Logger(lambda values, step: module.log_metrics(values, step=step), module.end_run)


def _trackio(module: ModuleType, out: Path, settings: dict[str, Any]) -> Logger:
    run = module.init(project=PROJECT, name=out.name, config=settings)
    return Logger(lambda values, step: run.log(values, step=step), run.finish)


_OPENERS: dict[str, Callable[[ModuleType, Path, dict[str, Any]], Logger]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "mlflow": _mlflow,
    "trackio": _trackio,
}
