"""From a file of results to Markdown and pictures: `python -m benchmarks.report FILE.json`.

`results_file.py` is the format, which also has to read every file under `results/`. Nothing here needs torch.
"""
