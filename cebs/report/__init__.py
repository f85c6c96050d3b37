"""The report: what it is made from (`inputs`), its tables and sentences (`tables`), its plots and its pages."""
