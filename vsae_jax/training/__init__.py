"""Rows to parameters: plan, resume, batches, step, optimizer, groups of arms."""
