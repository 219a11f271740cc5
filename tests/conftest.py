"""Every test runs as the command line does: with the fast BLAS in the process before mlx."""

from mlx_optiq_ext.blas import preload_blas

preload_blas()
