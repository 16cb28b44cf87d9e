"""Steps of an export: each reads artifacts and fills the folder of its own."""
