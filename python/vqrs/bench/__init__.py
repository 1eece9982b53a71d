"""Comparing tables that are trained in their compressed form: data, models, plans of runs, reports."""
