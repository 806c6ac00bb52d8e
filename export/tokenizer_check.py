"""Whether a shipped tokenizer gives the ids that Keras trained on."""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence

import numpy as np

SCRIPTS = (
    "Der schnelle braune Fuchs springt über den faulen Hund. Straße, GROẞ.",
    "Ο γρήγορος καφές· ΟΔΥΣΣΕΥΣ ὀδυσσεύς",
    "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "نص حكيم له سر قاطع وذو شأن عظيم",
    "עטלף אבק נס דרך מזגן שהתפוצץ כי חם",
    "नमस्ते दुनिया, आप कैसे हैं?",
    "我能吞下玻璃而不伤身体。漢字𠀀𪜀",
    "いろはにほへと ちりぬるを カタカナ ﾊﾝｶｸ",
    "키스의 고유조건은 입술끼리 만나야 하고",
    "เป็นมนุษย์สุดประเสริฐเลิศคุณค่ากว่าบรรดาฝูงสัตว์เดรัจฉาน",
    "Անհնար է ქართული አማርኛ ᏣᎳᎩ ꭰꭱ",
)
CODE = (
    "def f(x, *, y=None):\n\treturn {'a': x ** 2, \"b\": [i for i in y]}\n",
    "for (int i = 0; i < n; ++i) { a[i] += b[i]->c; } // it's 100% done",
    "<p class=\"x\">Tom &amp; Jerry's</p>  SELECT * FROM t WHERE a_b != 'c';",
)
SPACES = (
    "",
    " ",
    "   leading and   inner  runs and trailing   ",
    "tab\tnewline\n\nreturn\r\nform\fvertical\vend",
    "no\u00a0break thin\u2009space wide\u3000space line\u2028para\u2029next",
)
ODD = (
    "Café naïve Ångström résumé señor ﬁne ½ ² … ‥ ™ ！？，",
    "e\u0301 a\u030a\u0301 \u0301leading mark İstanbul ı ſ K Å ǰ ŉ",
    "👩\u200d👩\u200d👧 emoji 😀🏽 flag 🇩🇪 keycap 1️⃣ ❤️",
    "zero\u200bwidth\ufeffmark soft\u00adhyphen \u0600 \u180e \u034f x",
    "control \x00 \x01 \x1e \x1f \x7f \x85 \x97 end",
    "don't I'LL you've 'quoted' \u2018curly\u2019 \u201cdouble\u201d a-b_c",
    "12345 3.14159 1,000,000 2024-01-31 0xFF 1e-10 ٣٤ Ⅷ",
    "#hashtag ##ing @user $5 `tick` a^b ~ | \\ C++ C# .NET",
)
LONG = (
    "a" * 100 + " " + "a" * 101 + " " + "é" * 50 + " " + "é" * 51,
    "ก" * 33 + " " + "ก" * 34 + " " + "😀" * 25 + " " + "😀" * 26,
    "The model reads the first words and never the last ones. " * 400,
)
SPECIAL = (
    "[CLS] a [SEP] b [MASK] [PAD] [UNK] [cls] <s> </s> <pad> <unk> <mask>",
    "<|endoftext|> <bos> <eos> <start_of_turn>user <|begin_of_text|>",
)

BREAKS = (
    "code  \n    in blocks\n\n\n  with \n \n trailing\t\n\tblanks \r\n  end\n",
    "1 000,00 a1b22c333d4444 $12.50 (2+2)*3=12 v1.2.3-rc4 50% n°5 2ᵉ ①②",
    "snake_case camelCase HTTPServer x->y ::std --flag=1 {{a}} [[b]] <<c>>",
    "    \n\t\n  \n    return x\n        # two  spaces\n\n",
)

TEXTS = (*SCRIPTS, *CODE, *SPACES, *ODD, *LONG, *SPECIAL, *BREAKS)


def around(tokens: Sequence[str]) -> list[str]:
    """Texts in which each of `tokens` stands alone and among others."""
    texts = list(tokens)
    for token in tokens:
        texts += [
            f"a{token}b {token} c\n{token}\nd",
            f"{token}{token}  {token}",
        ]
    return texts


def differing_lines(
    texts: Sequence[str],
    expected: Mapping[str, np.ndarray | Sequence[np.ndarray]],
    found: Mapping[str, np.ndarray | Sequence[np.ndarray]],
    id_to_token: Callable[[int], str],
) -> list[str]:
    """One sentence per text whose inputs are not those that Keras makes."""
    lines = []
    for row, text in enumerate(texts):
        for name in expected:
            want, got = expected[name][row], found[name][row]
            if not np.array_equal(want, got):
                lines.append(_describe(text, name, want, got, id_to_token))
                break
    return lines


def _describe(
    text: str,
    name: str,
    want: np.ndarray,
    got: np.ndarray,
    id_to_token: Callable[[int], str],
) -> str:
    """Shows both sides from just before the first difference."""
    length = min(len(want), len(got))
    differs = np.flatnonzero(want[:length] != got[:length])
    first = max(int(differs[0]) - 1, 0) if len(differs) else length
    sides = []
    for ids in (want, got):
        some = [int(id) for id in ids[first : first + 5]]
        shown = (
            [id_to_token(id) for id in some] if name == "token_ids" else some
        )
        sides.append(f"{shown}")
    return f"- {text[:60]!r}: `{name}` is {sides[0]} in Keras, else {sides[1]}"
