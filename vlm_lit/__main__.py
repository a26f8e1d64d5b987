"""`python -m vlm_lit` and the console script `vlm-lit`."""

def main():
    "Run the command; Ctrl-C ends it without a traceback, also while it is imported."
    try:
        from vlm_lit.cli import main

        main()
    except KeyboardInterrupt: raise SystemExit(130) from None

if __name__ == "__main__": main()
