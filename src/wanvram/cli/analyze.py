"""TODO"""
import argparse
def prepare_parser(parser): ...
def run(args): return 0
