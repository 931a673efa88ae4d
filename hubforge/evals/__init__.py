"""What is measured of a model: one eval, one file. What several share has a name that begins with an underscore."""
