"""Five days of real trade through four services in one process, and the proof that nothing was lost."""
