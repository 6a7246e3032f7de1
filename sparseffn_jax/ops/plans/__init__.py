"""Which implementation runs an operator: costs by platform, tables of measurements, the choice."""
