"""What a page consists of."""

from html.parser import HTMLParser


class Tags(HTMLParser):
    """Tags with their attributes, and the text between them."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)


def assert_self_contained(text):
    """No tag fetches or runs anything: pictures are in the page, links lead within it."""
    tags = Tags(text).tags
    for tag, attributes in tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "form", "base"), tag
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "srcset", "action", "data", "poster"):
                assert value.startswith("data:image/" if name == "src" else "#"), value
    assert "url(" not in text
    assert "@import" not in text
    policy = next(each["content"] for tag, each in tags if tag == "meta" and "http-equiv" in each)
    assert policy.startswith("default-src 'none'; img-src data:;")
