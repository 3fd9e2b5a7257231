HAS_TRITON = False
def interpreting(): return False
