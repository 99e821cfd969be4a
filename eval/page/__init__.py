"""The evaluation report and training runs as HTML pages."""
