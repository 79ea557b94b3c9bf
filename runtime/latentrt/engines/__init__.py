"""Engines: the record, the store and the choice; shared by the runtime and the builder."""
