"""Schedules, one a file: the factor of a strength over optimiser steps. See `steer.intervene.schedule`."""
