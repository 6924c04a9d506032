"""The bodies of `jobs.bench_*`: what is measured, one module a figure."""
