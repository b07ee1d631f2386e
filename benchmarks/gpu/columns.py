"""What the columns of a job are called, in their order, in the report and on the page of performance."""

JOB = {
    "per_s": "a second",
    "ms_per_step": "ms a step",
    "gpu_ms_per_step": "GPU ms a step",
    "host_ms_per_step": "host ms a step",
    "kernels_per_step": "kernels a step",
    "peak_mb": "peak MB",
    "first_call_s": "first call s",
    "graph_breaks": "graph breaks",
    "cudagraph_skips": "CUDA graphs skipped",
    "off_float32": "off float32",
    "off_eager": "off eager",
}
