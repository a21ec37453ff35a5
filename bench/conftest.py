def pytest_addoption(parser):
    parser.addoption(
        "--large", action="store_true", help="bench: every case and torch.compile, not the small cases alone"
    )
