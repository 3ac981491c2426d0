"""What a measurement records of where it was made."""

import subprocess

from ipr_fast.evaluation import environment


def test_the_commit_is_that_of_the_package_not_of_a_repository_around_it(tmp_path, monkeypatch):
    def git(*arguments):
        author = ("-c", "user.name=a", "-c", "user.email=a@b.invalid")
        subprocess.run(["git", *author, *arguments], cwd=tmp_path, capture_output=True, check=True)

    file = tmp_path / "environment.py"
    file.touch()
    monkeypatch.setattr(environment, "FILE", file)
    git("init")
    git("commit", "--allow-empty", "--message", "theirs")
    assert environment.current_commit() == "unknown"
    git("add", file.name)
    git("commit", "--message", "ours")
    assert len(environment.current_commit()) == 12
