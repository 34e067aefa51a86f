"""What a run is: schema, composition, cross-section rules, resume compatibility. Imports no torch."""
