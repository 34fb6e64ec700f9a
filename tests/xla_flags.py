"""XLA flags that let tests compile for the CPU in a third of the time; compiling is what takes time there."""

from importlib.metadata import version

_NEW = tuple(map(int, version("jaxlib").split(".")[:2])) >= (0, 11)  # without the flag, which is refused there
QUICK_COMPILING = "--xla_cpu_parallel_codegen_split_count=1" + ("" if _NEW else " --xla_cpu_use_fusion_emitters=false")


def xla_flags(devices: int) -> str:
    """The value of XLA_FLAGS for a process that sees `devices` CPU devices."""
    return f"--xla_force_host_platform_device_count={devices} {QUICK_COMPILING}"
