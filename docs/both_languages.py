"""The site's search: English words by their stems, Chinese by pairs of characters."""

import re

from sphinx.search.en import SearchEnglish

PARTS = re.compile(r"[\u3400-\u9fff]+|[^\W\u3400-\u9fff]+")

class EnglishAndChinese(SearchEnglish):
    "Words of both languages, for the index and, by the same rule, for what a reader types."

    js_splitter_code = r"""
function splitQuery(query) {
  const parts = query.match(/[\u3400-\u9fff]+|[\p{L}\p{N}_]+/gu) || [];
  return parts.flatMap((part) => {
    const runs = part.match(/[\u3400-\u9fff]+|[^\u3400-\u9fff]+/gu);
    return runs.flatMap((run) => {
      if (!/[\u3400-\u9fff]/.test(run) || run.length === 1) return [run];
      return Array.from({length: run.length - 1}, (_, n) => run.slice(n, n + 2));
    });
  });
}
"""

    def split(self, input):
        found = []
        for part in PARTS.findall(input):
            if not re.match(r"[\u3400-\u9fff]", part): found.append(part)
            else:
                found += [*part, *(part[n : n + 2] for n in range(len(part) - 1))]
        return found
