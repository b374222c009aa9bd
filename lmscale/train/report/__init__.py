"""report.html: a run as one self-contained page, drawn from its folder alone."""
