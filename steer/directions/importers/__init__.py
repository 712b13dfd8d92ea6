"""File formats of other programs, one importer a file; `steer.directions.foreign` reads them."""
