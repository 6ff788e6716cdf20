"""The mathematics between noise and data: interpolants, targets, weightings, fields."""
