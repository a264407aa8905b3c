"""What people see of a run: the live display, the tables, the curves and the page.

* `progress.Display`: stage, step, a few numbers, elapsed and remaining time.
* `tables.print_table`: every table that a command prints.
* `gallery.Gallery`: keeps rollouts and their pictures while a run goes on; `trackers.Trackers` shows them and the metrics elsewhere.
* `html.write_page`: a page that stands alone; its templates share `templates/page.css`.
* `page.write_report`: `report.html` and `plots/` from a run folder alone; `metrics` reads the folder, `rollouts` chooses
  what is shown of `rollouts.jsonl`, `plots` and `groups` draw.
* `metrics.mean` leaves out None and NaN; `metrics.MEASURES` are the numbers of an evaluation.

To add a plot: a `Panel` in `panels.PANELS`, which names the metrics it shows. To add a card or a table: `page.py` and
`templates/report.html.j2`. Nothing here imports torch.
"""
