"""Who is to be cited: the papers of the methods, as BibTeX."""

from __future__ import annotations

from typing import NamedTuple

ARXIV = "arXiv:"
HEADING = "## Citation"


class Paper(NamedTuple):
    key: str
    author: str  # as BibTeX has it; `others` where the versions on arXiv differ in them
    title: str


# by the number on arXiv, of the version whose method it is; docs/reference/papers.md says the same to people
PAPERS = {
    "2106.04647": Paper(
        "karimi2021compacter",
        "Karimi Mahabadi, Rabeeh and Henderson, James and Ruder, Sebastian",
        "Compacter: Efficient Low-Rank Hypercomplex Adapter Layers",
    ),
    "2207.00112": Paper(
        "hsu2022fwsvd",
        "Hsu, Yen-Chang and Hua, Ting and Chang, Sung-En and Lou, Qian and Shen, Yilin and Jin, Hongxia",
        "Language model compression with weighted low-rank factorization",
    ),
    "2312.05821": Paper(
        "yuan2023asvd",
        "Yuan, Zhihang and Shang, Yuzhang and Song, Yue and others",
        "ASVD: Activation-aware Singular Value Decomposition for Compressing Large Language Models",
    ),
    "2403.07378": Paper(
        "wang2024svdllm",
        "Wang, Xin and Zheng, Yu and Wan, Zhongwei and Zhang, Mi",
        "SVD-LLM: Truncation-aware Singular Value Decomposition for Large Language Model Compression",
    ),
    "2405.14739": Paper(
        "si2024flora",
        "Si, Chongjie and Wang, Xuehui and Yang, Xue and Xu, Zhengqin and Li, Qingyun and Dai, Jifeng and Qiao, Yu "
        "and Yang, Xiaokang and Shen, Wei",
        "FLoRA: Low-Rank Core Space for N-dimension",
    ),
    "2409.15371": Paper("kang2024bone", "Kang, Jiale", "Bone: Block-Affine Adaptation of Large Language Models"),
    "2410.09692": Paper(
        "huang2024allora",
        "Huang, Hai and Balestriero, Randall",
        "ALLoRA: Adaptive Learning Rate Mitigates LoRA Fatal Flaws",
    ),
    "2410.13618": Paper(
        "shi2024loldu",
        "Shi, Yiming and Wei, Jiwei and Wu, Yujia and Ran, Ran and Sun, Chengwei and He, Shiyuan and Yang, Yang",
        "LoLDU: Low-Rank Adaptation via Lower-Diag-Upper Decomposition for Parameter-Efficient Fine-Tuning",
    ),
    "2412.19616": Paper(
        "huang2024gradnormlorp",
        "Huang, Jia-Hong and Shen, Yixian and Zhu, Hongyi and Rudinac, Stevan and Kanoulas, Evangelos",
        "Gradient Weight-normalized Low-rank Projection for Efficient LLM Training",
    ),
    "2501.08008": Paper(
        "liang2025triadaptlora",
        "Liang, Yao and Wang, Yuwei and Zeng, Yi",
        "TriAdaptLoRA: Brain-Inspired Triangular Adaptive Low-Rank Adaptation for Parameter-Efficient Fine-Tuning",
    ),
    "2502.14538": Paper(
        "chang2025mgpo",
        "Chang, Yupeng and Guo, Chenlu and Chang, Yi and Wu, Yuan",
        "LoRA-MGPO: Mitigating Double Descent in Low-Rank Adaptation via Momentum-Guided Perturbation Optimization",
    ),
    "2504.14810": Paper(
        "hu2025donod",
        "Hu, Jucheng and Yang, Suorong and Wu, Lijun and Zhou, Dongzhan",
        "DONOD: Efficient and Generalizable Instruction Fine-Tuning for LLMs via Model-Intrinsic Dataset Pruning",
    ),
    "2505.12805": Paper(
        "lee2025fedsvd",
        "Lee, Seanie and Park, Sangwoo and Lee, Dong Bok and Wagner, Dominik and Seong, Haebin and Bocklet, Tobias "
        "and Lee, Juho and Hwang, Sung Ju",
        "FedSVD: Adaptive Orthogonalization for Private Federated Learning with LoRA",
    ),
}


def link(paper: str) -> str:
    """`arXiv:2410.13618` as a link of Markdown; anything else as it stands."""
    address = paper.replace(ARXIV, "https://arxiv.org/abs/")
    return f"[{paper}]({address})" if paper.startswith(ARXIV) else paper


def citation(title: str, paper: str) -> list[str]:
    """The section that says whom to cite, or nothing where no paper is known.

    Args:
        title: of the method, which is all that is said of a paper that is not in the table (of a user's own method).
        paper: `arXiv:` and a number, or words.
    """
    if not paper:
        return []
    if not paper.startswith(ARXIV):
        return [f"{HEADING}\n\n{title}: {paper}"]
    number = paper.removeprefix(ARXIV)
    known = PAPERS.get(number)
    fields = {"author": known.author, "title": f"{{{known.title}}}"} if known else {"title": f"{{{title}}}"}
    fields |= {
        "year": f"20{number[:2]}",  # as arXiv numbers since 2007
        "eprint": number,
        "archivePrefix": "arXiv",
        "url": f"https://arxiv.org/abs/{number}",
    }
    entry = ",\n".join(f"  {name} = {{{value}}}" for name, value in fields.items())
    return [f"{HEADING}\n\n```bibtex\n@misc{{{known.key if known else paper},\n{entry}\n}}\n```"]
