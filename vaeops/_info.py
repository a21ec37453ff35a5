def info(): return {}
