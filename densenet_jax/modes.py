"""The modes: each takes checked settings and a work directory and returns the figures of the last line.

A mode imports what it needs when it runs: together they take seconds, in which a mistake could have been reported.
"""

import logging
import os
import warnings
from collections.abc import Callable
from typing import Any, TypeAlias

from densenet_jax.config import flatten, to_dict
from densenet_jax.config.run_settings import check_settings, read_run_settings, started_from
from densenet_jax.distributed import processes
from densenet_jax.errors import UserError, check_installed
from densenet_jax.flags import MODES, Command
from densenet_jax.system.console import print_status, spinner
from densenet_jax.system.disk import user_cache
from densenet_jax.system.logs import set_up_logging, start_quietly

logger = logging.getLogger(__name__)
Config: TypeAlias = Any  # ml_collections.FrozenConfigDict: its keys are not known to a type checker


def _set_up_jax(mode: str) -> None:
    """Caches compiled programs in $JAX_COMPILATION_CACHE_DIR, by default densenet_jax/compiled in the user's cache."""
    import jax

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", user_cache("compiled"))
    if mode == "plan":
        jax.config.update("jax_platforms", "cpu")  # nothing runs, and chips of this machine stay free
    start_quietly(jax.local_devices)


def train_mode(config: Config, workdir: str, command: Command) -> dict[str, Any]:
    """Trains from the newest good checkpoint of `workdir`, else from the start."""
    from densenet_jax.experiment import Experiment
    from densenet_jax.run.train import train

    experiment = Experiment(config)
    figures = train(experiment, workdir, command.defaults)
    try:
        from densenet_jax.report.run import report_run  # draws: imported when there is something to draw

        report_run(experiment, workdir, command)
    except Exception as error:  # the run is done and saved: its page must not fail it
        why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        logger.warning("the report could not be written (%s); --mode report tries again.", why)
    return figures


def report_mode(config: Config, workdir: str, command: Command) -> dict[str, Any]:
    """Writes report/index.html about the run in `workdir`, or report/compare.html about those of --compare."""
    if command.compare:
        from densenet_jax.report.compare import report_comparison

        return {"path": report_comparison(command.compare, workdir)}
    check_settings(workdir, config, command.defaults)
    from densenet_jax.experiment import Experiment
    from densenet_jax.report.run import report_run

    return {"path": report_run(Experiment(config), workdir, command)}


def eval_mode(config: Config, workdir: str, command: Command) -> dict[str, Any]:
    """Evaluates a checkpoint of `workdir`, or the weights that config.model.pretrained names; changes nothing there."""
    import jax
    import numpy as np

    from densenet_jax.experiment import Experiment
    from densenet_jax.report.per_class import ClassTables
    from densenet_jax.run.evaluate import evaluate, figures_by_class, figures_of
    from densenet_jax.training.best_metric import describe_figures
    from densenet_jax.training.restore import describe_checkpoints

    del command
    experiment = Experiment(config)
    tables = ClassTables(config.eval.per_class_output, config.eval.confusion_output)
    tables.check()
    if config.model.pretrained and not started_from(workdir, config.model.pretrained):
        step, what, variables = 0, config.model.pretrained, experiment.pretrained_variables()
    else:
        step, variables = experiment.saved_variables(workdir)
        what = f"step {step} of {workdir}"
        print_status(describe_checkpoints(workdir, config.checkpoint.best_metric))
    print_status(f"evaluating {what} on {config.data.name} {experiment.data.eval_split}")
    with spinner("compiling"):
        eval_step = experiment.compile_eval_step(confusion=tables.wanted)
    if (allowed := experiment.data.allowed_classes) is not None:
        print_status(f"judged among the {len(allowed)} classes of the split")
    counts = evaluate(
        eval_step,
        variables,
        experiment.data.eval_batches(),
        experiment.mesh,
        examples=len(experiment.data.eval_source),
        batch_count=experiment.data.eval_batch_count,
    )
    figures = figures_of(counts)
    if counts.confusion is not None and jax.process_index() == 0:
        tables.write(np.asarray(counts.confusion), experiment.data.eval_source.class_names, allowed)
    if left_out := int(counts.seen) - int(figures["examples"]):
        print_status(f"{left_out} images without a right class are left out")
    if counts.confusion is not None:
        print_status(f"{describe_figures(figures_by_class(counts))}  (means over classes)")
    if experiment.many_labels:
        print_status(f"{describe_figures(figures)}  (means over {figures['labels']} labels)")
    else:
        print_status(f"top-1 {figures['top1']:.3%}  top-5 {figures['top5']:.3%}  loss {figures['loss']:.4f}")
    if step == 0 and not experiment.many_labels:
        for line in experiment.published_beside(figures):
            print_status(line)
    return {"step": step, **figures}


def calibrate_mode(config: Config, workdir: str, command: Command) -> dict[str, Any]:
    """Fits temperature and thresholds to a checkpoint of `workdir` on the evaluated split, and writes them there."""
    import numpy as np

    from densenet_jax.experiment import Experiment
    from densenet_jax.predict.calibration import calibration_path, write_calibration
    from densenet_jax.run.calibrate import calibrate

    experiment = Experiment(config)
    step, variables = experiment.saved_variables(workdir)
    split = f"{config.data.name} {experiment.data.eval_split}"
    print_status(f"calibrating step {step} of {workdir} on {split}")
    fit = calibrate(experiment, variables, each_label=command.each_label, specificity=command.specificity)
    content = {
        "split": split,
        "examples": fit.examples,
        "class_names": list(experiment.data.eval_source.class_names),
        "temperatures": fit.temperatures.tolist(),
        "thresholds": fit.thresholds.tolist(),
        "specificity": command.specificity,
        "before": fit.before._asdict(),
        "after": fit.after._asdict(),
        "reliability": [each.to_dict() for each in fit.reliability],
    }
    path = write_calibration(workdir, step, content) if processes.is_first() else calibration_path(workdir)
    for words, before, after in zip(("ECE", "Brier score", "loss"), fit.before, fit.after, strict=True):
        print_status(f"{words} {before:.4f} before, {after:.4f} after")
    beside = {f"{name}_before": value for name, value in fit.before._asdict().items()}
    temperature = float(np.mean(fit.temperatures))
    figures = {"temperature": temperature, **fit.after._asdict(), **beside}
    return {"step": step, "examples": fit.examples, **figures, "path": path}


def predict_mode(config: Config, workdir: str, command: Command) -> dict[str, Any]:
    """Predicts the --images with a checkpoint of `workdir`, or with the weights that config.model.pretrained names."""
    config = _as_trained(config, workdir, command)
    from densenet_jax.predict.batch import PredictOptions, predict
    from densenet_jax.predict.model import make_deployed

    warnings.filterwarnings("ignore", module="PIL")  # warnings about odd files; unreadable ones are reported by name
    options = PredictOptions(
        images=command.images,
        output=command.output or os.path.join(workdir, "predictions.jsonl"),
        topk=command.topk,
        annotate=command.annotate,
        explain=command.explain,
        explain_layer=command.explain_layer,
        features=command.features,
        largest_batch=config.eval.batch_size,
    )
    return predict(lambda: make_deployed(config, workdir, command.labels), options)


def serve_mode(config: Config, workdir: str, command: Command) -> dict[str, Any]:
    """Answers requests over REST and gRPC with the predictions of --mode predict, until it is stopped."""
    from densenet_jax.distributed.preemption import end_when_asked
    from densenet_jax.predict.model import make_deployed
    from densenet_jax.predict.predictor import Predictor
    from densenet_jax.serve.limits import LIMITS, NEEDED, Access, listen

    warnings.filterwarnings("ignore", module="PIL")
    check_installed("--mode serve", NEEDED, "pip install -r requirements-serve.txt")
    end_when_asked()
    from densenet_jax.serve.server import serve

    with listen(command.host, command.port, command.grpc_port) as listener:
        config = _as_trained(config, workdir, command)
        access = Access(config, command.host)
        deployed = make_deployed(config, workdir, command.labels)
        print_status(f"serving {deployed.source}")
        predictor = Predictor(deployed, batch_sizes=config.serve.batch_sizes, limits=LIMITS)
        return serve(predictor, listener, command.grpc_port, access, config)


def _as_trained(config: Config, workdir: str, command: Command) -> Config:
    """Returns the settings of the run in `workdir` with the command line's changes; `config` for pretrained weights."""
    if config.model.pretrained and not started_from(workdir, config.model.pretrained):
        return config
    return read_run_settings(workdir, command.overrides, command.defaults)


def export_mode(config: Config, workdir: str, command: Command) -> dict[str, Any]:
    """Writes the model as a file for other programs, checked against the model; see --format."""
    config = _as_trained(config, workdir, command)
    from densenet_jax.export.export import ExportOptions, export
    from densenet_jax.export.samples import Samples
    from densenet_jax.predict.model import Deployed, make_deployed

    options = ExportOptions(
        format=command.format,
        output=command.output,
        default_output=os.path.join(workdir, "export", config.model.name),
        precision=command.precision,
        preprocess=command.preprocess,
        batch_size=command.batch_size,
        overwrite=command.overwrite,
        maps=command.maps,
    )
    if config.model.dtype == "int8":
        raise UserError("config.model.dtype is 'int8', which no file has; export an int8 file by --precision int8.")
    samples = Samples(config, command.images)

    def load_model() -> Deployed:
        model = make_deployed(config, workdir, command.labels)
        samples.check_same(model)
        return model

    return export(load_model, samples, options)


def schedule_mode(config: Config, workdir: str, command: Command) -> dict[str, Any]:
    """Draws the learning rate over the steps to schedule.png; needs no data set where its size is known."""
    from densenet_jax.experiment import Experiment
    from densenet_jax.report.schedule import plot_schedule

    del command
    experiment = Experiment(config)
    examples, counted = experiment.data.count_train_examples()
    if not counted:
        print_status(f"{config.data.name} is not prepared here; taking its known {examples:,} training images")
    title = f"{config.optim.schedule}, {config.model.name}"
    return plot_schedule(experiment.schedule, experiment.timeline, workdir, title)


def prepare_mode(config: Config, workdir: str, command: Command) -> dict[str, Any]:
    """Prepares the data set of the settings where it is not yet prepared, and verifies every image of it."""
    from densenet_jax.run.prepare import prepare_and_verify

    del workdir, command  # data sets lie in config.data.dir
    return {"name": config.data.name, "splits": prepare_and_verify(config)}


def data_mode(config: Config, workdir: str, command: Command) -> dict[str, Any]:
    """Writes report/data.html: sample images, class balance, sizes, and the pipeline's speed beside the model's."""
    from densenet_jax.experiment import Experiment
    from densenet_jax.report.data import report_data

    del command
    return report_data(Experiment(config), workdir, config.data.name)


def plan_mode(config: Config, workdir: str, command: Command) -> dict[str, Any]:
    """Compiles the step for the chips of --topology, which need not be there, and reports its costs."""
    from densenet_jax.plan.plan import plan

    del workdir
    return plan(config, command.topology)


def parameters_mode(config: Config, workdir: str, command: Command) -> dict[str, Any]:
    """Prints the model's parameters as a table, and the cost of one image."""
    from densenet_jax.experiment import Experiment
    from densenet_jax.report.parameters import parameter_table

    del workdir, command
    table, figures = parameter_table(Experiment(config))
    print_status(table)
    return {"model": config.model.name, **figures}


FUNCTIONS: dict[str, Callable[[Config, str, Command], dict[str, Any]]] = {
    mode: globals()[f"{mode}_mode"] for mode in MODES
}
# Settings in which hosts may differ: where data are and how they are read.
_OF_THE_HOST = ("data.dir", "data.table", "data.reader_threads", "data.prefetch_batches")


def run(mode: str, config: Config, workdir: str, command: Command) -> dict[str, Any]:
    """Runs one mode in a process of its own and returns the figures of its last line."""
    set_up_logging()
    _set_up_jax(mode)
    settings = (f"config.{key}={value}" for key, value in flatten(to_dict(config)) if key not in _OF_THE_HOST)
    processes.check_same("settings", "\n".join([f"--mode {mode}", *settings]))
    return {"mode": mode, **FUNCTIONS[mode](config, workdir, command)}
