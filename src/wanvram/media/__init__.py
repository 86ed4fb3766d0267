"""Pictures and videos: read and checked before a model is loaded, written as they are finished."""
