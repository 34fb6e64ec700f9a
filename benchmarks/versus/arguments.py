"""Flags that the comparisons share, with defaults for this machine."""

from __future__ import annotations

import argparse

from versus import cases


def comparison_parser(
    description: str,
    *,
    models: list[str],
    batch_sizes: list[int],
    turns: int,
    turn_secs: float,
    many_sizes: bool = False,
) -> argparse.ArgumentParser:
    """Makes a parser with every shared flag and these defaults; with many_sizes, --image_size_px is a list."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=models, help="names of the variants table, or 'all'")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=batch_sizes)
    parser.add_argument("--turns", type=int, default=turns, help="turns of each implementation")
    parser.add_argument("--turn_secs", type=float, default=turn_secs, help="least length of a turn")
    parser.add_argument("--resume", action="store_true", help="keep the rows of --output and measure the others")
    cases.add_arguments(parser, many_sizes=many_sizes)
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parses the command line; adds the models' names, the device's dtype and `on_gpu`."""
    arguments = parser.parse_args()
    arguments.on_gpu = cases.has_gpu()
    arguments.dtype = arguments.dtype or ("bfloat16" if arguments.on_gpu else "float32")
    arguments.models = cases.all_models(arguments.models)
    return arguments
