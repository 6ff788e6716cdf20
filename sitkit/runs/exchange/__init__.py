"""Runs and other codes' checkpoints: conversion in, export out, the MLflow model."""
