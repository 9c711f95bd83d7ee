"""What EventStoreDB 24.2.0 was asked when its answers were recorded: `eventstoredb_cases.json` beside this folder."""
