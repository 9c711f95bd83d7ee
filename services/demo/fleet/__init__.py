"""The same trade through real processes over RabbitMQ, with faults in the middle, and the proof that none mattered."""
