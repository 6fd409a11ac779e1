"""The study: does a filter help, by how much, and why?"""
