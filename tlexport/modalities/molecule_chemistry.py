"""One molecule: its canonical SMILES, tokens, scaffold, fingerprint and descriptors. RDKit works, and keeps quiet."""

from __future__ import annotations

import contextlib
import importlib.util
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tlexport.errors import DataError, NotInstalledError

# Atoms in brackets, two-letter elements, aromatic atoms, bonds, branches, ring closures (Schwaller et al., ACS Cent. Sci.
# 2019, 5, 1572, supporting information).
PATTERN = (
    r"\[[^\]]+\]|Br|Cl|N|O|S|P|F|I|B|C|b|c|n|o|s|p|\(|\)|\.|=|#|-|\+|\\|/|:|~|@|\?|>|\*|\$|%[0-9]{2}|[0-9]"
)
_TOKENS = re.compile(PATTERN)
_MOST = 255  # a substructure's count in the fingerprint, a uint8

_SCALARS = """
    MolWt HeavyAtomMolWt ExactMolWt NumValenceElectrons NumRadicalElectrons HeavyAtomCount NHOHCount NOCount
    MolLogP MolMR TPSA LabuteASA FractionCSP3 NumHAcceptors NumHDonors NumHeteroatoms NumRotatableBonds RingCount
    NumAliphaticCarbocycles NumAliphaticHeterocycles NumAliphaticRings NumAromaticCarbocycles NumAromaticHeterocycles
    NumAromaticRings NumSaturatedCarbocycles NumSaturatedHeterocycles NumSaturatedRings BalabanJ BertzCT HallKierAlpha
    Kappa1 Kappa2 Kappa3 Chi0 Chi0n Chi0v Chi1 Chi1n Chi1v Chi2n Chi2v Chi3n Chi3v Chi4n Chi4v
    MaxAbsEStateIndex MaxEStateIndex MinAbsEStateIndex MinEStateIndex
    MaxPartialCharge MinPartialCharge MaxAbsPartialCharge MinAbsPartialCharge
    BCUT2D_MWHI BCUT2D_MWLOW BCUT2D_CHGHI BCUT2D_CHGLO BCUT2D_LOGPHI BCUT2D_LOGPLOW BCUT2D_MRHI BCUT2D_MRLOW
"""
_FRAGMENTS = """
    Al_COO Al_OH Ar_COO Ar_N Ar_NH Ar_OH COO C_O C_S Imine NH0 NH1 NH2 N_O Ndealkylation1 Nhpyrrole SH aldehyde
    alkyl_halide allylic_oxid amide amidine aniline aryl_methyl azo benzene bicyclic epoxide ester ether furan guanido
    halogen hdrzine imidazole imide ketone lactam lactone methoxy morpholine nitrile nitro nitro_arom nitroso oxazole
    para_hydroxylation phenol phos_acid phos_ester piperdine piperzine pyridine quatN sulfide sulfonamd sulfone
    term_acetylene tetrazole thiazole thiophene unbrch_alkane urea
"""
_BINNED = {"PEOE_VSA": 14, "SMR_VSA": 10, "SlogP_VSA": 12, "EState_VSA": 11, "VSA_EState": 10}

# RDKit's own names (rdkit.Chem.Descriptors), in the order of the graph's input.
DESCRIPTORS: tuple[str, ...] = (
    *_SCALARS.split(),
    *(f"{name}{place + 1}" for name, bins in _BINNED.items() for place in range(bins)),
    *(f"fr_{name}" for name in _FRAGMENTS.split()),
)


def require() -> None:
    """Raises NotInstalledError without RDKit."""
    if importlib.util.find_spec("rdkit") is None:
        raise NotInstalledError("RDKit, which reads molecules,", "molecule")


def version() -> str:
    """RDKit's, which the canonical form and the descriptors depend on."""
    import rdkit

    return str(rdkit.__version__)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """RDKit writes each complaint to stderr; what is wrong is told by whoever asks."""
    from rdkit import rdBase

    with rdBase.BlockLogs():
        yield


def canonical(smiles: str) -> str:
    """RDKit's canonical isomeric SMILES. Raises ValueError saying why there is none."""
    from rdkit import Chem

    mol = Chem.MolFromSmiles(smiles)
    if mol is None:
        raise ValueError(_complaint(smiles))
    if not mol.GetNumAtoms():
        raise ValueError("no atoms")
    return str(Chem.MolToSmiles(mol))


def _complaint(smiles: str) -> str:
    from rdkit import Chem

    mol = Chem.MolFromSmiles(smiles, sanitize=False)
    if mol is None:
        return "no valid SMILES"
    problems = Chem.DetectChemistryProblems(mol)
    return f"no possible molecule: {problems[0].Message()}" if problems else "no possible molecule"


def tokens(smiles: str) -> tuple[str, ...]:
    """The SMILES cut into atoms, bonds, branches and ring closures. Raises ValueError for what is none of them."""
    found = tuple(_TOKENS.findall(smiles))
    if "".join(found) != smiles:
        raise ValueError("holds characters that are no SMILES tokens")
    return found


def fragments(smiles: str) -> int:
    """More than one: a salt or a mixture."""
    return smiles.count(".") + 1


def scaffold(smiles: str) -> str:
    """The Bemis-Murcko scaffold (J. Med. Chem. 1996, 39, 2887) without chirality, as MoleculeNet takes it; "" without rings."""
    from rdkit import Chem
    from rdkit.Chem.Scaffolds import MurckoScaffold

    return str(MurckoScaffold.MurckoScaffoldSmiles(mol=Chem.MolFromSmiles(smiles), includeChirality=False))


def fingerprinter(radius: int, bits: int) -> Callable[[Any], NDArray[np.uint8]]:
    """Molecule -> uint8 [bits]: how often each hashed substructure occurs (Morgan, RDKit's defaults), at most 255."""
    from rdkit.Chem import rdFingerprintGenerator

    generator = rdFingerprintGenerator.GetMorganGenerator(radius=radius, fpSize=bits)
    return lambda mol: np.minimum(generator.GetCountFingerprintAsNumPy(mol), _MOST).astype(np.uint8)


def describer(names: tuple[str, ...]) -> Callable[[Any], NDArray[np.float32]]:
    """Molecule -> float32 [n] of RDKit's descriptors of these names, NaN where one is undefined.

    Raises DataError if this RDKit lacks any.
    """
    from rdkit.Chem import Descriptors

    known = dict(Descriptors.descList)
    if absent := [name for name in names if name not in known]:
        raise DataError(
            f"RDKit {version()} has no descriptor {', '.join(absent)}; use the version of the run"
        )
    functions = [known[name] for name in names]

    def describe(mol: Any) -> NDArray[np.float32]:
        values = np.array([function(mol) for function in functions], np.float64)
        limit = np.finfo(np.float32).max
        values[~np.isfinite(values) | (np.abs(values) > limit)] = np.nan
        return values.astype(np.float32)

    return describe
