"""Forms of questions of which it is known what happens to them when the images change places.

A list of what is allowed. Every sentence must be of one of these forms as a whole, and what a form leaves open (`_X`, "shows
a dog on a sofa") must look at one image alone: it may hold no word that compares images or puts them in a sequence, on
a side or next to each other, and no number or letter that may name one. Whatever is not covered is of no form.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from perl.permutation import CARDINALS, ORDINALS

Form = Literal[
    "which",
    "bare",
    "option",
    "compare",
    "relate",
    "number",
    "truth",
    "thing",
    "arrange",
    "values",
    "options",
]
"""What is asked for: an image, by what it shows (`which`; `bare` where the question does not say that it is an image,
`option` where it says that it is something else), beside the one other image (`compare`) or beside an image that the
question names (`relate`); how many, whether or what, of all images alike; their sequence; a value of each in turn; or
which statement about named images holds."""

NAMED = "\0"
"""Stands for the name of an image in a sentence."""

_LONGEST = 300  # Characters of a sentence; a longer one is of no known form.

_ONE = r"(?:image|picture|photo|photograph|figure|panel|one)"
_NOUN = r"(?:images|pictures|photos|photographs|figures|panels)"
_OPTION = r"(?:option|candidate|choice|answer)"
_MANY = rf"(?:{'|'.join(CARDINALS[1:])}|[0-9]{{1,2}})"
_THESE = (
    rf"(?:(?:the|these|those|the following|the given|the above) (?:{_MANY} )?(?:given )?{_NOUN})"
)
_EVERY = rf"(?:(?:both|all|all {_MANY}|both of|all of|all {_MANY} of)(?: {_THESE}| {_NOUN}))"
_ANY = rf"(?:(?:any|either|each|every|every one|each one)(?: of {_THESE}| {_ONE}))"
_SHOW = r"(?:show|contain|have|depict|feature|include|display|share)"
_STATE = r"(?:shows?|contains?|ha(?:s|ve)|depicts?|features?|includes?|displays?|is|are)"

# Words that put images beside or behind each other, whatever else they mean.
_PLACES = (
    rf"(?:{'|'.join(ORDINALS)}|[0-9]{{1,2}}(?:st|nd|rd|th)|last|former|latter|left|right|top(?<!on top)|bottom|upper|lower|"
    r"middle|cent(?:er|re|ral)|(?:left|right|top)-?most|left-\w+|right-\w+|side|adjacent|neighbo\w*|between|among|next(?! to)|"
    r"previous\w*|preceding|following|opposite|row|column|corner|edge|diagonal\w*|position\w*|(?<!the same )places?|placed|misplaced|"
    r"(?:behind|under|over|above|below|beneath|beside|around|near|next to|in front of) it|beneath$|(?:both|either) sides?|here|there(?! (?:is|are|an?|any)\b)|outer|inner|\w+er-?most|foremost|"
    r"(?:in|on|of|down|up|out of) (?:the|this|that|a) (?:list|page|screen|display|prompt|message|grid|layout|strip|line|queue))"
)
_TIMES = (
    r"(?:before\w*|after\w*|then|earlier|later|latest|earliest|until|since|once|already|still|yet|again|now|longer|"
    r"any ?more|when|while|during|begin\w*|began|begun|start\w*|end|ends|ended|ending|finish\w*|stop\w*|resum\w*|continu\w*|"
    r"becom\w*|became|turn\w*|grow\w*|grew|grown|shr[aiu]nk\w*|chang\w*|mov(?:e|es|ed|ing|ement)|happen\w*|occur\w*|sequen\w*|"
    r"series|consecutive\w*|successive\w*|order\w*|steps?|stages?|phases?|frames?|video\w*|clip|footage|time-?lapse|"
    r"timeline|story\w*|process|progress\w*|initial\w*|final\w*|result\w*|outcome|transition\w*|follow\w*|preced\w*|comes?|coming|leads?|complet\w*|"
    r"appear(?:ed|ing)|disappear\w*|(?:new|recent)ly|new|newer|been|being|got|gets?|getting|gone|went|came|arriv\w*|"
    r"left|flew|fallen|melt\w*|freez\w*|opening|closing|rising|falling|increas\w*|decreas\w*|edit\w*|add(?:ed|ing)|"
    r"remov\w*|missing|chronolog\w*|respectively|turns?|so far|thus far|hitherto|henceforth|(?:here|there)after|subsequent\w*|"
    r"prior|formerly|lately|eventually|meanwhile|interim|meantime|in advance|upcoming|onwards?|backwards?|midway|halfway|"
    r"alternat\w*|vice versa|anew|afresh|reappear\w*|return\w*|insert\w*|replac\w*|skip\w*|causes?|effects?|penultimate|"
    r"(?:breaks?|fits?|violates?) the pattern|moment|aftermath|consequen\w*|react\w*|climax|punch ?line|introduc\w*|"
    r"establish\w*|recent|advanced|life ?cycle|goal state|(?:pre|post)dat\w*|revealed|scored|let (?:in|out|go)|about to|as it|"
    r"for good|running total|cumulative|accumulat\w*|up to|to date|lost|gained|half as|double the|(?:pre|se)quel|omit\w*|drop(?:s|ped)|exchang\w*|switch\w*|mixed up)"
)
_ARRANGED = (
    r"(?:together|sorted|arrang\w*|rank\w*|alphabetical\w*|ascending|descending|numerical\w*|correct\w*|incorrect\w*|"
    r"wrong\w*|proper\w*|shuffl\w*|swap\w*|revers\w*|out of|number(?:ed|ing|s)?|index\w*|labell?\w*|count(?:ed|ing)?)"
)
# Words that look from one image to another, or at what all of them make up.
_COMPARED = (
    r"(?:others?|another|else|rest|remaining|same|differ\w*|similar\w*|alike|unlike|like|identical|equal\w*|"
    r"compar\w*|match\w*|correspond\w*|pair\w*|partner\w*|belong\w*|fits?|odd|outlier|extra|relat\w*|resembl\w*|reference|query|"
    r"anchor|template|original\w*|source|target|given|across|over time|through|"
    r"combin\w*|concat\w*|join\w*|spell\w*|form|forms|formed|words?|letters?|phrase|sentence|digits?|subtract\w*|"
    r"divid\w*|ratio|quotient|minus|instead|likewise|also|too|either|elsewhere|additional\w*|duplicat\w*|cop(?:y|ies|ied)|"
    r"repeat\w*|repetition|twice|redundant|superfluous|unnecessary|irrelevant|contradict\w*|overlap\w*|adjoin\w*|"
    r"(?:of|to|with|from|for|by) it|(?:shows?|contains?|depicts?|has|have) (?:it|its|this|that))"
)
_ASKING = r"(?:which|what|how|who|whose|where|why|these|those|them|they)"
_A_NUMBER = rf"(?:[0-9]|(?:{'|'.join(CARDINALS)})\b)"
_DEGREES = (
    r"tall|larg|small|bigg|dark|bright|light|high|low|long|short|old|young|clos|near|farth|furth|"
    r"fast|slow|warm|cold|hott|thick|thinn|wid|narrow|full|empt|strong|weak|deep|clean|lat|steep|"
    r"fatt|great|loud|soft|\w+i|clear|sharp|round|rich|smooth|rough|calm|heav|dens|quiet"
)
_COMPARATIVES = rf"(?:(?:more|less|fewer)(?! than {_A_NUMBER})|than(?! {_A_NUMBER})|(?:{_DEGREES})er|better|worse)"
# A number counts what follows it, or it may name an image; so may a letter.
_NAMES = r"(?:[0-9]+(?! [a-z]{2})|(?<!['’])[b-hj-z](?!['’]))"
_SINGULAR = r"(?:the|this) (?:image|picture|photo|photograph|figure)"
_IMAGES = rf"(?:{_NOUN}|image|picture|photo|photograph|figure|panel|{_OPTION}s?|(?:the|that|this|an?)(?: [a-z]+)? ones?|one (?:before|after|on|to|at))"


def _without(*barred: str, stop: str = ";") -> str:
    """Any words but these, and no name of an image."""
    return rf"(?:(?!\b(?:{'|'.join(barred)})\b)[^{stop}{NAMED}])+?"


_ALWAYS = (_PLACES, _TIMES, _ARRANGED, _NAMES, _ASKING)
_X = _without(*_ALWAYS, _COMPARED, _COMPARATIVES, _IMAGES)
_MORE = _without(*_ALWAYS, _COMPARED, _IMAGES)
_LIKE = _without(*_ALWAYS, _IMAGES)
_SAID = _without(*_ALWAYS, _COMPARED, _COMPARATIVES, _SINGULAR)
_VALUE = rf"(?:its rank(?: by [a-z ]+)?|(?:how many |whether |the number of )?{_SAID})(?:,? in (?:the same |the )?order(?: (?:shown|given))?)?"

_OUT_OF = (
    rf"(?: (?:of|among|from|in|out of) (?:{_THESE}|{_EVERY}|(?:the|these) (?:other|remaining) (?:{_MANY} )?{_NOUN}|these|them|those|"
    rf"the {_MANY}|the following|the {_OPTION}s)|"
    r" (?:shown |given )?(?:below|above|here))"
)
_OTHERS = (
    rf"(?:the |all the |all )?(?:others|other {_NOUN}|other ones|rest|other {_MANY}(?: {_NOUN})?)"
)
_AN_IMAGE = rf"(?:image|picture|photo|photograph|figure|panel|{_NOUN}|{_OPTION}s?)"
_WHICH = (
    rf"(?:(?:in |on |at |from )?(?:(?:which|what)(?: (?:single|one|two|three|other))? {_AN_IMAGE}{_OUT_OF}?|which(?: ones?)?{_OUT_OF})"
    rf"|(?:of|among|out of|between) {_THESE},? which(?: ones?| {_AN_IMAGE})?)"
)
_VERB = r"(?:is|are|was|were|shows?|has|have|contains?|depicts?|looks?|does|do|would|can|could)"
_BARE = rf"which(?: ones?)?(?= {_VERB}\b)"
# What an image does by itself; it "comes", "introduces" or "continues" by where it stands.
_SHOWING = (
    r"(?=(?:clearly |only |actually |best |does not |doesn't |do not |don't )?(?:is|are|was|were|shows?|contains?|ha(?:s|ve)|depicts?|features?|"
    r"includes?|displays?|looks?|seems?|portrays?|captures?|represents?|illustrates?|conveys?|evokes?|expresses|suggests?|can|could)\b|(?:do|does) (?:you|we) see\b|"
    r"(?:do|does) .*\b(?:wear|hold|sit|stand|lie|carry|ride|smile|sleep|rain|snow)\b(?! (?:up|down|off|away|out|over|back)\b))"
)
_PICK = (
    r"(?:(?:please |now )?(?:(?:pick|choose|select|find|identify|point out|point to|name|tell me|indicate|give|state|write|list|mark|"
    r"show me|spot|locate|determine)(?: out)?|what is|which is)(?: the (?:number|letter|index|label)s? of)?)"
)
_THE_ONE = rf"(?:(?:all|only|the|an?|any|every|those|both|one of) )*(?:single )?(?:{_AN_IMAGE}|ones?){_OUT_OF}?"
_THAT = r"(?:that|which|who|with|without|where|in which|on which|showing|containing|depicting|featuring|displaying|of|having)"
_RELATED = (
    rf"(?=[^{NAMED}]*\b(?:same|similar\w*|dissimilar|like|alike|unlike|match\w*|resembl\w*|differ\w*|identical|equal\w*|correspond\w*|"
    rf"than|congruent|isomorphic|equivalent|(?:the|an?) [a-z ]+ (?:of|in|from))\b|(?:shows?|contains?|depicts?|features?) {NAMED}(?: again)?$)"
)
"""To another image by what both show."""
_TOTAL = r"(?: (?:together|in total|altogether|in all|combined|overall))"
_IN_ALL = rf"(?: (?:in|on|across|among) (?:{_THESE}|{_EVERY}))"
_SEEN = (
    r"(?:appear|are there|are shown|are visible|are seen|can be seen|can you see|do you see|are)"
)

_QUANTIFIED = (
    rf"(?:(?:(?:at least|at most|exactly|only) )?(?:one|two|three|four)|both|all|each|every|no|none|neither|some|an|a)"
    rf"(?: of {_THESE})?(?: (?:{_NOUN}|{_ONE}))? {_STATE} {_SAID}"
    rf"|one (?:{_ONE}|of {_THESE}) {_STATE} {_SAID},? (?:and|while|but|whereas) the other(?: {_ONE})? {_STATE} {_SAID}"
    rf"|one {_ONE} {_STATE} (?:{_MORE}|twice as many {_SAID}) (?:than|as) the other(?: {_ONE})?"
    rf"|{_SAID} in one {_ONE} (?:is|are) (?:{_COMPARATIVES}) than {_SAID} in the other(?: {_ONE})?"
    rf"|(?:the combined {_NOUN}|(?:{_THESE}|{_EVERY}) (?:together|combined)|together,? {_THESE}) {_STATE} (?=.*\b(?:no|{_MANY})\b){_SAID}"
    rf"|(?:all|every|each|no|none|some)(?: of)?(?: the)? {_SAID} in (?:{_THESE}|{_EVERY}) (?:is|are|ha(?:s|ve)) {_SAID}"
    rf"|in (?:(?:at least|exactly|only) )?(?:one|both|all|each|every|no) (?:of {_THESE}|{_NOUN}|{_ONE}),? {_SAID}"
    rf"|there (?:is|are) (?:{_SAID}|(?:exactly|at least|at most|more than|fewer than|less than) {_SAID})"
)
_TRUTH_OF = re.compile(
    rf"(?:is (?:this|that|it|(?:the|this)(?: following)? (?:statement|sentence|claim|description)) (?:true|correct|right|false)(?: or (?:false|not|wrong|incorrect))?"
    rf"(?: (?:of|for|about) (?:both|{_THESE}))?|true or false|(?:{_THESE}, )?judge (?:the|this) statement)"
)
_STATEMENT = re.compile(_QUANTIFIED)
_CAPTION = r"(?:caption|description|text|sentence|title|phrase|prompt|statement)"

# By what they show, and not by how they stand.
_BY = (
    r"(?:(?!\b(?:revers\w*|opposite|shown|given|current|same|displayed|left|right|number\w*|numeric\w*|label\w*|index|proper|"
    r"appear\w*|original|pairs|place|position|distance|from the first(?! to)|listed|presented|printed|arranged|here)\b)[a-z ,])"
)

_WRITTEN: tuple[tuple[Form, str], ...] = (
    ("options", r"which (?:(?:of (?:these|the following)|statement|option|answer|one|of (?:these|the following) statements) )?"
                r"(?:is|are) (?:true|correct|right|false|wrong|not true)"),
    ("options", rf"which (?:pair|two|{_NOUN})(?: of {_NOUN})? (?:shows?|depicts?|contains?|ha(?:s|ve)|are of) the same {_X}"),
    ("which", rf"{_WHICH},? {_SHOWING}{_X}"),
    ("which", rf"{_PICK} {_THE_ONE} {_THAT} {_X}"),
    ("which", rf"{_WHICH} (?:is|looks|seems) (?:the )?(?:odd one out|odd one|outlier|(?:most )?(?:different from|unlike|dissimilar to) {_OTHERS})"),
    ("which", rf"{_WHICH} (?:(?:does not|doesn't) belong(?: (?:with|to|among) (?:{_OTHERS}|the (?:same )?group))?|differs from {_OTHERS}|is not like {_OTHERS})"),
    ("which", rf"{_WHICH} (?:best |is |does |most |is best )*(?:match(?:es)?|fits?|corresponds? to|goes? with|described by|depicts?|shows?|illustrates?) "
              rf"(?:best )?(?:the |this )?(?:following |given )?{_CAPTION}"),
    ("which", rf"{_WHICH} does (?:the |this )?(?:following |given )?{_CAPTION} (?:best )?(?:describe|match|fit|belong to)"),
    ("which", rf"{_PICK} the odd (?:one|{_ONE})(?: out)?"),
    ("bare", rf"{_BARE} {_X}"),
    ("bare", rf"which of (?:these|the following) (?:{_MANY} )?[a-z]+s {_SHOWING}{_X}"),
    ("option", rf"(?:in |on )?(?:which|what)(?: of the)? (?!(?:letter|number|digit|word)s?\b)[a-z]+(?: [a-z]+)?(?: below| above)? {_VERB} {_X}"),
    ("relate", rf"{_WHICH},? (?:other than|besides|apart from|except) {NAMED},? {_X}"),
    ("relate", rf"(?:given {NAMED},? )?(?:in |on )?which(?: one)? of {NAMED}(?: (?:and|or) {NAMED})* {_LIKE}(?: {NAMED}(?: {_X})?)?"),
    ("truth", _QUANTIFIED),
    ("which", rf"which (?:pair of|{_MANY}) (?:of {_THESE}|{_NOUN}) (?:(?:show|depict|contain|have|share|are of) the same {_X}|are (?:identical|alike|the same))"),
    ("compare", rf"(?:{_WHICH}|{_BARE}|which of (?:these|the following) [a-z]+s) {_SHOWING}{_MORE}(?: than the other(?: {_ONE})?)?"),
    ("compare", rf"{_PICK} {_THE_ONE} {_THAT} {_MORE}(?: than the other(?: {_ONE})?)?"),
    ("compare", rf"(?:between|of|comparing) {NAMED} (?:and|or|with) {NAMED},? which(?: {_ONE})? {_MORE}"),
    ("relate", rf"{_WHICH} {_RELATED}{_LIKE} {NAMED}(?:,?(?: but| and)? {_X}| again)?"),
    ("relate", rf"{_PICK} {_THE_ONE} {_THAT} {_RELATED}{_LIKE} {NAMED}"),
    ("relate", rf"given {NAMED},? {_WHICH} {_LIKE}(?: {NAMED})?"),
    ("arrange", rf"(?:please )?(?:put|arrange|sort|order|place|rearrange) (?:{_THESE}|the [a-z]+ (?:shown )?in {_THESE}|the (?:steps|events|scenes|frames|stages))"
                rf"(?: (?:in|into|by|from) (?:the |their |its )?{_BY}+?)?(?:,? \w+est first)?"),
    ("arrange", rf"rank {_THESE} from (?:the )?{_BY}+ to (?:the )?{_BY}+"),
    ("arrange", rf"in (?:what|which) (?:order|sequence) (?:were|are|should|do|did|would|must) (?:they|{_THESE}) (?!stand$)(?:{_BY}|, )+"),
    ("arrange", r"(?:what is|give|state|find|determine) the (?:(?:correct|right|proper|chronological|temporal) )+(?:order|sequence) of "
                rf"(?:{_THESE}|these)"),
    ("values", rf"(?:for|of|in) (?:each|every)(?: of {_THESE}| {_ONE})(?:,? (?:in turn|in (?:the )?(?:order|sequence)(?: (?:shown|given))?))?,? "
               rf"(?:(?:give|state|write|name|tell|list) )?{_VALUE}"),
    ("values", rf"(?:give|state|write|name|tell|list) (?:for|of) (?:each|every)(?: of {_THESE}| {_ONE})(?:,? (?:in turn|in (?:the )?order(?: (?:shown|given))?))?,? {_VALUE}"),
    ("values", rf"{_VALUE}(?: {_ONE})? (?:for|of|in) (?:each|every)(?: of {_THESE}| {_ONE}),? (?:in turn|in (?:the )?order(?: (?:shown|given))?)"),
    ("number", rf"how many (?:other )?(?:of {_THESE}|{_NOUN}) (?:{_STATE}|were|was|do not show|do not contain) {_X}"),
    ("number", rf"in how many (?:other )?(?:of {_THESE}|{_NOUN}) (?:is|are|can you see|do you see|can we see|do we see|does|do) {_X}"),
    ("number", rf"(?:in total,? )?how many (?:different |distinct |unique )?{_X} {_SEEN}(?:{_TOTAL}|(?:{_IN_ALL}{_TOTAL}?)|(?:{_TOTAL}{_IN_ALL}))"),
    ("number", rf"how many {_X} do (?:{_THESE}|{_EVERY}) (?:show|contain|have){_TOTAL}"),
    ("number", rf"what is the (?:total number of|sum of) (?:{_X}|(?:all )?the (?:numbers|values|digits)(?: shown| written)?){_IN_ALL}"),
    ("number", rf"(?:in )?how many (?:other )?(?:of {_THESE}|{_NOUN}) (?:{_STATE}) {_LIKE} {NAMED}"),
    ("number", rf"(?:count|what is|give|state) (?:the )?(?:number of )?(?:the )?{_NOUN} {_THAT} {_X}"),
    ("truth", rf"is there (?:an?|any|at least one) {_ONE} {_THAT} {_X}|(?:does|is) at least one (?:of {_THESE}|{_ONE}) (?:{_SHOW} )?{_X}"),
    ("truth", rf"is (?:it|this|he|she) the same {_X} in (?:{_EVERY}|{_ANY})"),
    ("truth", rf"do {_EVERY} {_SHOW} {_X}|(?:do|does) {_ANY} {_SHOW} {_X}"),
    ("truth", rf"(?:are {_EVERY}|(?:is|are) {_ANY}) (?:taken )?(?:in|at|of|from) {_X}"),
    ("truth", rf"(?:does|do) any other {_ONE}s? {_SHOW} {_LIKE}(?:{NAMED})?"),
    ("truth", rf"(?:is|are) there (?:a|an|any|at least one) {_X} in (?:{_EVERY}|{_ANY})"),
    ("truth", rf"do {_THESE} {_SHOW} the same {_X}|do {_EVERY} {_SHOW} the same {_X}"),
    ("truth", rf"(?:is|are) the same {_X} (?:shown|visible|seen|depicted|present) in (?:{_THESE}|{_EVERY})"),
    ("truth", rf"(?:are|were) (?:{_THESE}|{_EVERY}) (?:identical|the same|alike|similar|(?:[a-z]+ )?(?:in|at|of|from|by|with) the same {_X})"),
    ("truth", rf"do the {_MANY} [a-z]+ {_SHOW} the same {_X}|are the {_MANY} [a-z]+ (?:identical|alike|the same|isomorphic|congruent|equivalent)"),
    ("truth", rf"(?:is|are) {_X} (?:visible|shown|present|seen|depicted) in (?:{_EVERY}|{_ANY})"),
    ("truth", rf"do {_THESE} have {_X} in common"),
    ("truth", rf"is it (?:true|correct) (?:of|for) (?:both|{_THESE}) that (?:{_QUANTIFIED})"),
    ("truth", rf"is it (?:true|correct) that (?:{_QUANTIFIED})"),
    ("thing", rf"what do (?:{_THESE}|{_EVERY}) have in common|what is common (?:to|in|among) (?:{_THESE}|{_EVERY})"),
    ("thing", rf"(?:what|which) {_X} do (?:{_THESE}|{_EVERY}) (?:have in common|share)"),
    ("thing", rf"(?:what|which) (?!two|many|number)(?:{_X} )?(?:is|are|appears|occurs) (?:visible |shown |present )?in (?:{_EVERY}|{_ANY})"),
    ("thing", rf"(?:what|which) {_X} (?:is|are) {_X} in {NAMED}|what (?:is|are) {_X} in {NAMED}"),
    ("number", rf"how many {_X} (?:are|are there|can be seen) in {NAMED}"),
    ("truth", rf"(?:is|are) {_X} in {NAMED}(?: {_X})?|is {NAMED} {_X}|does {NAMED} (?:show|contain|have) {_X}"),
    ("truth", rf"(?:is|are) {_X} in {NAMED} \w+er than (?:{_X}|the ones?) in {NAMED}|is {NAMED} \w+er than {NAMED}"),
    ("number", rf"how many more {_X} (?:has|does) {NAMED} (?:have )?than {NAMED}"
               rf"|how many more {_X} are (?:there )?in {NAMED} than in {NAMED}"),
)  # fmt: skip
_FORMS: tuple[tuple[Form, re.Pattern[str]], ...] = tuple(
    (form, re.compile(pattern)) for form, pattern in _WRITTEN
)

_REFERENCE = r"(?:(?:the |this |that |an? )?(?:reference|query|anchor|target|source|template|original)(?: (?:image|picture|photo|one))?)"
_ABOUT = _without(*_ALWAYS)
_ALL_BUT_ONE = re.compile(
    rf"(?:(?:only |exactly )?one of (?:{_THESE}|them)|(?:all|every {_ONE}) (?:but|except) one(?: of {_THESE})?) {_ABOUT}"
)
_EXCEPTION = re.compile(
    rf"which(?: one| {_ONE})? (?:(?:does|is|has|was) not|doesn't|isn't|is it|is the (?:exception|one))"
)
_IS_REFERENCE = re.compile(
    rf"(?:(?:take |use |given )?{NAMED} (?:is|shows|depicts|as|for) (?:{_REFERENCE}|{_SAID})|{_REFERENCE} is {NAMED})"
)
# Sentences that say nothing about which image is which.
_INTRODUCTION = re.compile(
    rf"(?:(?:look at|consider|compare|examine|study|observe|view|see|here are|here is|these are|you (?:see|are given|are shown)|given|"
    rf"below are|there are) (?:both |all )?(?:{_THESE}|{_EVERY}|{_MANY} {_NOUN}|{_NOUN})(?: carefully| closely| below| above)?"
    rf"|(?:{_THESE}|{_EVERY}) are (?:numbered|labell?ed|indexed|counted) from [0-9]+(?: to [0-9]+)?"
    rf"|(?:{_THESE}|{_EVERY}) (?:show|are|were taken (?:in|at|on)|depict|come from) {_SAID}"
    rf"|(?:yes or no|true or false)|questions?|{_OPTION}s?|{_NOUN}|query|reference|context|{_CAPTION})(?: [0-9a-f])?"
)
_ANSWER_WORDS = re.compile(
    r"(?:(?:please|answer|respond|reply|give|provide|write|state|output|enter|select|choose|pick|use|return|say|only|just|directly|simply|"
    r"with|by|using|as|in|the|your|an?|one|single|(?:correct|right|best|following) (?:answers?|options?|choices?|letters?|numbers?|label|format)|"
    r"(?:correct|best) (?:image|picture|photo|one)|(?:listed|given|options|choices|shown) (?:below|above)|"
    r"options?|option's|choices?|letters?|numbers?|words?|phrase|index|indices|labels?|of|from|given|images?|pictures?|photos?|"
    r"yes|no|true|false|or|and|short|integer|digits?|numeral|counting|count|counted|indexed|based|starting|start|at|zero|between|to|"
    r"such|two|three|listed|question|format|name|all|that apply|list|separated|commas?|exactly|a-[a-h]|[0-9]|[a-h])(?:[\s,/()\[\]'\"-]+|\Z))+"
)
_A_NUMBER_OF = re.compile(
    r"\b(?:number|count|sum) of (?:the |all |these |given |your |correct )*(?!choices?\b)\w+s\b|\bcount\Z"
)
_REASONING = re.compile(
    r"(?:(?:\\?boxed|</?(?:think|answer)>|think\w*|reason\w*|thoughts?|process|internal|monologue|mind|step|first|then|finally|about|through|it|this|"
    r"provide[sd]?|final|must|should|be|is|are|will|enclosed?d?|wrap\w*|within|inside|put|place[d]?|tags?|box|you|user|assistant|"
    r"detailed|carefully|brief\w*|explain\w*|explanation|conversation|solve[sd]?|solution|responses?|following|do|so|let's|let|us|me|i|e|and|like|e\.g|"
    r"please|answer\w*|respond|reply|give|write|state|output|enter|return|only|just|with|by|using|use|as|in|the|your|an?|"
    r"correct|options?|choices?|letters?|number|of|to|or|format|question|for|before|after|here|at|end|image|picture|x|[0-9]|[a-h])"
    r"(?:[\s,/()\[\]{}'\"$`*-]+|\Z|(?=[<\\])|(?<=>)))+"
)
_SIDED = re.compile(
    r"\b(?:left|right(?! (?:answer|option|choice|letter|number))|next|neighbo\w*|adjacent|previous|preceding|beside|opposite|"
    r"(?:before|after|below|above) (?:it|that|this|the)|following (?:image|picture|photo|one))\b"
)
_TELLING = re.compile(rf"\b(?:{_PLACES}|{_TIMES})\b")
_COMPARES = re.compile(rf"\b(?:{_COMPARATIVES}|{_COMPARED})\b")
_OF_PLACES = re.compile(
    rf"\b(?:(?:{'|'.join(ORDINALS)}|last|left|right|leftmost|rightmost|middle|top|bottom|upper|lower|other|former|latter|previous|next) "
    rf"(?:{_AN_IMAGE}|ones?|two|three)|adjacent|neighbo\w*|former|latter|misplaced|out of place|order|shuffl\w*|swap\w*|revers\w*|"
    rf"(?:wrong|right|correct) (?:place|position|order|spot)|{_OPTION}s? [0-9a-h])\b"
)
# Where a candidate stands, when it was taken, or what else than a candidate is asked for.
_OF_CANDIDATES = re.compile(
    rf"^(?:when|at what|how|where (?:do|does|did))\b|\b(?:which|what) (?:letter|number|digit|order|sequence)s?\b|\bletters?\b"
    rf"|\b(?:at|from|since|until|up to) (?:which|what) {_AN_IMAGE}\b|\b(?:(?:at|on|in) )?which {_AN_IMAGE} (?:has|had) (?:the|an?|he|she|it)? ?(?:\w+ )?(?:been|gone|\w+ed)\b"
    rf"|\b(?:{_AN_IMAGE}|ones?|they) (?:is|are|was|were|lies?|stands?|get|shown|can be)? ?(?:taken |seen )?(?:right |just |directly )?"
    r"(?:(?:to|on|at) (?:the|its) (?:left|right)|(?:left|right) of|next to|beside|behind|between|ahead|in the middle|at the end|shown from|sorted|"
    r"arranged|ordered|ranked|numbered|better|worse|one too)\b"
    rf"|\b(?:between|before|after|from|until|beside|is|are|and|or|than) [a-h](?: (?:and|or|on|to)\b|$)|\b(?:{'|'.join(ORDINALS)}|last) (?:position|place|spot)\b"
    r"|\b(?:out of sequence|alphabetical\w*|story|tale|trend|video|clip|footage|frames|from one to|in turn|temporal|come in|"
    r"(?:options|candidates|choices|images|pictures) before)\b"
)
_ORDINAL_ANSWER = re.compile(
    rf"(?:answer|reply|respond) with (?:only )?(?:{'|'.join(ORDINALS)})(?:,? (?:or )?(?:{'|'.join(ORDINALS)}))+"
)
# What is said of the place of an image itself, and of a moment rather than a state.
_SELF = re.compile(
    rf"\b(?:{_AN_IMAGE}|ones?|that|which)(?: of {_THESE})? (?:is|are|was|were|stands?|lies?|sits?) (?:the |directly |right |just )*(?:next|"
    r"beside|behind|above|below|under\w*|over|near\w*|clos\w*|far\w*|furth\w*|surrounded|flanked|around|within|inside|outside|in front|"
    r"beneath|beyond|along\w*|abreast|aside|apart|ahead|past|facing|paired|at the|on the|to the|on top|off|"
    r"\w+er (?:up|down)|as (?:close|near|far)|(?:\w+ )?(?:shown|displayed|presented|listed|printed|located|positioned|found|put|set|seen)|isolated|alone|"
    r"contiguous|connected|linked)\b"
    rf"|\b{_AN_IMAGE} (?:is|are|was|were) (?:it|this|that|best|true|referred to|(?:being )?(?:meant|mentioned|described|discussed))$"
    rf"|\b(?:in|on|at|from) (?:which|what|how many)(?: (?:other|single|of {_THESE}))*(?: {_AN_IMAGE})?{_OUT_OF}? (?:has|have|had|was|were) "
    r"|\b(?:in|on|at) (?:which|what|how many) .*\b(?:open|close|leave|enter|exit|vanish|arrive|bounce|switch|start|stop|reach(?:ed)?|"
    r"passed|go (?:on|off|out|by)|come (?:in|out|on))$"
)
_STANDS_BY = re.compile(
    rf"\b(?:next|near\w*|clos\w+|beside|behind|under|above|below|over|by|around|along|far)(?: to| from)? {NAMED}"
)
_REMAINING = re.compile(r"\b(?:which|what|how many)(?: of)?(?: the| these)? (?:other|remaining)\b")
_RANK = re.compile(rf"rank {_THESE}(?: by [a-z ]+)?(?:, \w+est first)?")
_FORMATS = re.compile(
    r"\\boxed|<think>|</think>|<answer>|step by step|internal monologue|reasoning process|final answer"
)


def asked_for(sentences: Sequence[str]) -> Form | None:
    """What the sentences of a question ask for, in lower case and with `NAMED` for each image that is named; None: they are of
    no known form."""
    rest = [s for s in sentences if not is_instruction(s) and not _INTRODUCTION.fullmatch(s)]
    if any(_IS_REFERENCE.fullmatch(s) for s in rest):
        rest = [s for s in rest if not _IS_REFERENCE.fullmatch(s)]
        rest = [re.sub(rf"\b(?:{_REFERENCE}|it|him|her|that)\b", NAMED, s, count=1) for s in rest]
    if not rest or any(len(s) > _LONGEST or _SELF.search(s) for s in rest):
        return None
    if len(rest) == 2 and any(
        _STATEMENT.fullmatch(a) and _TRUTH_OF.fullmatch(b) for a, b in (rest, reversed(rest))
    ):
        return "truth"
    if len(rest) == 2 and _ALL_BUT_ONE.fullmatch(rest[0]):
        if _EXCEPTION.fullmatch(rest[1]):
            return "which"
        rest = rest[1:]
    if len(rest) == 2 and _RANK.fullmatch(rest[0]):
        rest = rest[1:]
    if len(rest) != 1:
        return None
    if _STANDS_BY.search(rest[0]) or (_REMAINING.search(rest[0]) and NAMED not in rest[0]):
        return None
    return next((form for form, pattern in _FORMS if pattern.fullmatch(rest[0])), None)


def is_instruction(sentence: str) -> bool:
    """Whether a sentence is about the form of the answer alone."""
    if _A_NUMBER_OF.search(sentence):
        return False
    if _FORMATS.search(sentence):
        return bool(_REASONING.fullmatch(sentence)) and not _SIDED.search(sentence)
    return bool(_ANSWER_WORDS.fullmatch(sentence) or _ORDINAL_ANSWER.fullmatch(sentence))


def asks_for_candidate(sentences: Sequence[str], options: bool) -> bool:
    """Whether a question about the images before it has one of the images behind it as its answer: whatever it asks of the
    others, these may change places among themselves, unless it speaks of their places.

    `options`: a letter or number stands beside each of them, and they end the question; else it must ask for an image.
    """
    asks = options or any(
        re.search(rf"\b(?:which|what)(?: of)?(?: the| these)?(?: \w+)? {_AN_IMAGE}\b", s)
        for s in sentences
    )
    placed = any(
        _OF_PLACES.search(s) or NAMED in s or (_OF_CANDIDATES.search(s) and not is_instruction(s))
        for s in sentences
    )
    return asks and not placed and not any(_SIDED.search(s) for s in sentences if is_instruction(s))


def names_image(sentences: Sequence[str]) -> bool:
    """Whether a question has a word for an image."""
    return any(re.search(rf"\b{_AN_IMAGE}\b", s) for s in sentences if not is_instruction(s))


def compares(text: str) -> bool:
    """Whether a text compares something with what it does not name."""
    return bool(_COMPARES.search(text.lower()))


def telling_word(sentences: Sequence[str]) -> str:
    """The first word that may put images beside each other or in a sequence; empty if there is none."""
    found = (_TELLING.search(s) for s in sentences if not is_instruction(s))
    return next((match[0] for match in found if match), "")
